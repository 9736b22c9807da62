"""Between two looks the training loop reads no value from a tensor: on a GPU each such read waits for the device."""

import contextlib
import traceback

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sophia import optimizers
from sophia.optim import kernels
from sophia.optim.soap import SOAP
from sophia.optim.sophia import Sophia
from sophia.optim.sophia_k import SophiaK
from sophia.optimizers import Optimizers
from sophia.step import Stepper
from sophia.train import Trainer
from tests.train import runs

# What a tensor's values decide on the host: how a program goes on, or the shape of a result.
_READING_OPERATORS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero")
_READING_METHODS = ("tolist", "numpy", "__array__", "cpu")
# Where the loop is to wait: the guards' look, evaluations, checkpoints.
_LOOKS = ("_look", "_evaluate_when_due", "_checkpoint_when_due")


class Reads(TorchDispatchMode):
    """Remembers where values are read, as long as the context lasts, except in what is `allowed`."""

    def __init__(self):
        super().__init__()
        self.found, self.in_refreshes, self._methods = [], [], _Methods(self)
        self._allowed = self._allowed_reads = self._refreshes = 0

    @contextlib.contextmanager
    def allowed(self):
        self._allowed += 1
        try:
            yield
        finally:
            self._allowed -= 1

    @contextlib.contextmanager
    def refresh(self):
        """As `allowed`; `in_refreshes` has the numbers of those in which something was read."""
        before = self._allowed_reads
        with self.allowed():
            yield
        if self._allowed_reads > before:
            self.in_refreshes.append(self._refreshes)
        self._refreshes += 1

    def note(self, name):
        if self._allowed:
            self._allowed_reads += 1
        else:
            places = [f"{frame.name} ({frame.filename.rpartition('/')[2]})" for frame in traceback.extract_stack()]
            self.found.append(f"{name} by {' < '.join(reversed(places[-8:-2]))}")

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition("::")[2].partition(".")[0] in _READING_OPERATORS:
            self.note(func.name())
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Reads that are no operators."""

    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _READING_METHODS:
            self._reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


class SyncErrors:
    """CUDA's own detector of waits, with the face of `Reads`."""

    found = ()

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def allowed(self):
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    refresh = allowed


def allow(monkeypatch, context, owner, *names):
    """Run these methods in a context."""
    for name in names:
        original = getattr(owner, name)

        def within(*args, _original=original, **kwargs):
            with context():
                return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, within)


def watched(monkeypatch, reads):
    """Watch the loop of every run, from its beginning to its end."""
    run = Trainer.run

    def watched_run(self):
        with reads:
            return run(self)

    allow(monkeypatch, reads.allowed, Trainer, *_LOOKS)
    # The one exemption: an estimate of the curvature, every tenth step, may read whether it was finite.
    allow(monkeypatch, reads.refresh, Stepper, "refresh")
    # Their count of steps lies in main memory, wherever the parameters are.
    for kind in (torch.optim.NAdam, SOAP, SophiaK):
        allow(monkeypatch, reads.allowed, kind, "step")
    monkeypatch.setattr(Trainer, "run", watched_run)
    runs.without_plots(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


FLAGS = {"log_interval": 4, "eval_interval": 6, "checkpoint_interval": 5}


@pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
def test_on_the_cpu_one_flag_is_read_which_lies_there_already(tmp_path, data, monkeypatch, optimizer):
    reads = Reads()
    watched(monkeypatch, reads)
    allow(monkeypatch, reads.allowed, Optimizers, "_leaves_out")
    assert runs.train(data, tmp_path / "run", optimizer=optimizer, **FLAGS) == 0
    assert reads.found == []
    assert reads.in_refreshes == ([0, 10] if optimizer.startswith("sophia") else [])


def far_away(monkeypatch):
    """Take main memory to be as far away as a GPU's, and Sophia's steps by the operations that run there, too."""
    monkeypatch.setattr(optimizers, "_READ_AT_ONCE", frozenset())
    monkeypatch.setattr(kernels, "readable", lambda tensor: False)
    build = optimizers.build

    def built(*args):
        parts = build(*args)
        for part in parts:
            if isinstance(part, Sophia):
                for group in part.param_groups:
                    group["foreach"] = True
        return parts

    monkeypatch.setattr(optimizers, "build", built)


@pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
def test_as_on_a_gpu(tmp_path, data, monkeypatch, optimizer):
    """NAdamW, Muon, SOAP and Sophia-K cannot leave a step out by themselves."""
    far_away(monkeypatch)
    reads = Reads()
    watched(monkeypatch, reads)
    assert runs.train(data, tmp_path / "run", optimizer=optimizer, **FLAGS) == 0
    assert len(reads.found) == (12 if optimizer in ("nadamw", "muon", "soap", "sophia-k") else 0), reads.found
    assert all("_leaves_out" in place for place in reads.found)
    assert reads.in_refreshes == ([0, 10] if optimizer.startswith("sophia") else [])


@pytest.mark.parametrize("method", ["item", "tolist", "__bool__", "numpy"])
def test_a_read_in_the_loop_is_found(tmp_path, data, monkeypatch, method):
    reads = Reads()
    watched(monkeypatch, reads)
    allow(monkeypatch, reads.allowed, Optimizers, "_leaves_out")
    clip = Stepper.clip

    def reading(self):
        norm = clip(self)
        getattr(norm, method)()
        return norm

    monkeypatch.setattr(Stepper, "clip", reading)
    assert runs.train(data, tmp_path / "run", optimizer="adamw", **FLAGS) == 0
    assert len(reads.found) == 12
    assert all("reading" in place for place in reads.found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "adamw", "lion", "signum"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu(tmp_path, data, monkeypatch, optimizer, precision):
    watched(monkeypatch, SyncErrors())
    flags = {**FLAGS, "device": "cuda", "precision": precision, "compile": "off"}
    assert runs.train(data, tmp_path / "run", optimizer=optimizer, **flags) == 0
