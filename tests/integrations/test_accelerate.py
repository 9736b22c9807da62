"""`integrations.accelerate.attach`: an Accelerate loop stays AdamW's, and the weights are those of the plain loop."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sophia import SophiaG, SophiaH, SophiaK
from tests.models import TinyForCausalLM, assert_same, curvature, same, seeded

pytest.importorskip("accelerate", reason="needs Accelerate (the extra `hf`)")

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState

from sophia.integrations.accelerate import attach

VOCAB, ROWS, LENGTH = 50, 12, 6
SETTINGS = {"lr": 1e-2, "curvature_interval": 3}


def build():
    """Dropout makes every number that is drawn matter."""
    return nn.Sequential(
        nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, VOCAB, bias=False)
    )


def loader(count):
    generator = torch.Generator().manual_seed(1)
    both = torch.randint(0, VOCAB, (2, count * ROWS, LENGTH), generator=generator)
    return DataLoader(TensorDataset(*both), batch_size=ROWS)


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.fixture
def accelerated():
    """Builds an Accelerator; what it keeps in the process is gone after the test."""

    def make(**settings):
        forget()
        return Accelerator(cpu=True, **settings)

    yield make
    forget()


def forget():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(accelerator, model, optimizer, data, *, clip=None, first=0):
    """A loop as Accelerate's users write it."""
    for index, (tokens, targets) in enumerate(data, start=first):
        with accelerator.accumulate(model):
            torch.manual_seed(index)
            loss = loss_of(model(tokens), targets)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def plain(data, *, accumulate=1, clip=None, precision="no"):
    """The same training as a loop, with the refresh written out."""
    net = seeded(build)
    optimizer = SophiaG(net.parameters(), **SETTINGS)

    def autocast():
        return contextlib.nullcontext() if precision == "no" else torch.autocast("cpu", torch.bfloat16)

    for index, (tokens, targets) in enumerate(data):
        torch.manual_seed(index)
        with autocast():
            logits = net(tokens)
        (loss_of(logits.float(), targets) / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        with autocast():
            optimizer.refresh_curvature(lambda tokens=tokens: net(tokens[:8]))
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def prepared(accelerator, count=9, kind=SophiaG, **settings):
    net = seeded(build)
    params = SophiaK.groups(net) if kind is SophiaK else net.parameters()
    model, optimizer, data = accelerator.prepare(net, kind(params, **SETTINGS, **settings), loader(count))
    return model, optimizer, data


# ---- the same weights


@pytest.mark.parametrize(
    ("accumulate", "clip", "precision"), [(1, None, "no"), (3, 0.1, "no"), (1, 0.1, "bf16"), (2, None, "bf16")]
)
def test_is_equal_to_the_plain_loop(accelerated, accumulate, clip, precision):
    accelerator = accelerated(gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model, optimizer, data = prepared(accelerator, 12)
    assert attach(optimizer, model) is optimizer
    train(accelerator, model, optimizer, data, clip=clip)
    net, explicit = plain(loader(12), accumulate=accumulate, clip=clip, precision=precision)
    assert optimizer.optimizer.param_groups[0]["clock"] == 12 // accumulate
    assert optimizer.optimizer.refreshes == explicit.refreshes == -(-(12 // accumulate) // 3)
    assert_same(model.parameters(), net.parameters())
    assert_same(curvature(optimizer.optimizer), curvature(explicit))
    assert not any(same(p, q) for p, q in zip(net.parameters(), seeded(build).parameters(), strict=True))


def test_is_equal_to_the_plain_loop_under_a_loss_scaler(accelerated):
    accelerator = accelerated()
    # Accelerate makes one for fp16 on a GPU only; what it does with it is the same here.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model, optimizer, data = prepared(accelerator, 6)
    attach(optimizer, model)
    train(accelerator, model, optimizer, data)
    assert accelerator.scaler.get_scale() == 2.0**12
    assert not optimizer.step_was_skipped
    net, _ = plain(loader(6))
    assert_same(model.parameters(), net.parameters())  # a power of two scales exactly


def test_step_that_the_loss_scaler_withholds_is_none(accelerated):
    accelerator = accelerated()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, optimizer, data = prepared(accelerator, 1)
    attach(optimizer, model)
    (tokens, targets), inner = next(iter(data)), optimizer.optimizer
    for overflow in (True, False):
        accelerator.backward(loss_of(model(tokens), targets))
        if overflow:
            model[4].weight.grad[0] = float("inf")
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == overflow
        assert inner.param_groups[0]["clock"] == inner.refreshes == (0 if overflow else 1)


def test_resumed_from_a_saved_state_is_equal_to_uninterrupted(accelerated, tmp_path):
    accelerator = accelerated()
    model, optimizer, data = prepared(accelerator, 9)
    attach(optimizer, model)
    items = list(data)
    train(accelerator, model, optimizer, items[:5])  # between two refreshes
    accelerator.save_state(tmp_path / "state")
    train(accelerator, model, optimizer, items[5:], first=5)

    accelerator = accelerated()
    rest, resumed, _ = prepared(accelerator, 9)
    attach(resumed, rest)
    with torch.no_grad():
        for p in rest.parameters():
            p.zero_()  # all must come from the folder
    accelerator.load_state(tmp_path / "state")
    assert resumed.optimizer.param_groups[0]["clock"] == 5
    train(accelerator, rest, resumed, items[5:], first=5)
    assert_same(rest.parameters(), model.parameters())
    assert_same(curvature(resumed.optimizer), curvature(optimizer.optimizer))


def test_attached_before_prepare_is_the_same(accelerated):
    accelerator = accelerated(mixed_precision="bf16")
    net = seeded(build)
    optimizer = SophiaG(net.parameters(), **SETTINGS).attach(net)
    model, optimizer, data = accelerator.prepare(net, optimizer, loader(4))
    train(accelerator, model, optimizer, data)
    twin, _ = plain(loader(4), precision="bf16")
    assert_same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("kind", [SophiaH, SophiaK])
def test_other_optimizers_of_the_family(accelerated, kind):
    accelerator = accelerated()
    model, optimizer, data = prepared(accelerator, 4, kind)
    attach(optimizer, model, logits=(lambda logits: logits.square().mean()) if kind is SophiaH else None, max_batch=4)
    train(accelerator, model, optimizer, data)
    assert optimizer.optimizer.refreshes == 2


def test_ignored_labels_do_not_count(accelerated):
    accelerator = accelerated(mixed_precision="bf16")  # which wraps the model's forward
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[:, :3] = -100
    net, twin = seeded(TinyForCausalLM), seeded(TinyForCausalLM)
    model, optimizer = accelerator.prepare(net, SophiaG(net.parameters(), **SETTINGS))
    attach(optimizer, model)
    accelerator.backward(model(tokens, labels).loss)
    optimizer.step()
    explicit = SophiaG(twin.parameters(), **SETTINGS)
    counts = torch.tensor([False, False, True, True, True, False]).expand(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        explicit.refresh_curvature(lambda: (twin(tokens).logits, counts))
    assert_same(curvature(optimizer.optimizer), curvature(explicit))


# ---- bad input


def test_forgotten_line_is_a_clear_error(accelerated):
    accelerator = accelerated()
    model, optimizer, data = prepared(accelerator, 2)
    with pytest.raises(RuntimeError, match="sign-momentum"):
        train(accelerator, model, optimizer, data)


def test_what_is_not_prepared_or_no_sophia_is_refused(accelerated):
    accelerator = accelerated()
    model, optimizer, _ = prepared(accelerator)
    with pytest.raises(ValueError, match=r"bare SophiaG: call accelerator\.prepare"):
        attach(optimizer.optimizer, model)
    with pytest.raises(ValueError, match="the optimizer comes first"):
        attach(model, optimizer)
    with pytest.raises(ValueError, match="is AdamW, which has no curvature"):
        attach(accelerator.prepare(torch.optim.AdamW(model.parameters())), model)
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        attach(optimizer, seeded(build))
    attach(optimizer, model)
    with pytest.raises(RuntimeError, match="attached to a model already"):
        attach(optimizer, model)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_engines_that_cannot_work_are_refused_at_once(accelerated, kind):
    model, optimizer, _ = prepared(accelerated())
    optimizer.accelerator_state.distributed_type = kind
    with pytest.raises(ValueError, match=f"does not support {kind.value}"):
        attach(optimizer, model)


def test_tensor_parallelism_is_refused_at_once(accelerated):
    model, optimizer, _ = prepared(accelerated())
    optimizer.accelerator_state.parallelism_config = SimpleNamespace(tp_enabled=True)
    with pytest.raises(ValueError, match="does not support tp_size"):
        attach(optimizer, model)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "sophia.integrations.accelerate")
    monkeypatch.setitem(sys.modules, "accelerate.optimizer", None)
    with pytest.raises(ImportError, match=r"pip install 'sophia-lm\[hf\]'"):
        import sophia.integrations.accelerate  # noqa: F401


def test_the_library_imports_none_of_the_packages():
    names = ("accelerate", "lightning", "pytorch_lightning", "transformers")
    code = f"import sys, sophia, sophia.integrations; sys.exit(str(sys.modules.keys() & {set(names)}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip()
    assert found == "set()"


# ---- the documentation


PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "accelerate.md"


def test_code_of_the_documentation_runs(accelerated, tmp_path, monkeypatch, capsys):
    accelerated()  # on the CPU, also where there is a GPU
    monkeypatch.chdir(tmp_path)
    scope = {"model": seeded(build), "loader": loader(4), "F": F, "PADDING": 0}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), scope)
    assert scope["optimizer"].optimizer.param_groups[0]["clock"] == 2
    assert scope["optimizer"].optimizer.refreshes == 1
    assert 0 < float(capsys.readouterr().out) <= 1
