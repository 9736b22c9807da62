"""How many sequences go into one forward pass: the most that fit, fewer when memory runs out, and the same result."""

import re

import pytest
import torch

from sophia import micro_batch, plan, session
from sophia.config import BatchSettings, ModelSettings, OptimizerSettings, ScheduleSettings, TrainSettings
from sophia.distributed import World
from sophia.model import GPT
from tests.train import runs

GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    runs.without_plots(monkeypatch)


def session_of(data, out, *, rows=12, size="auto", **optimizer):
    settings = TrainSettings(
        data=data,
        out=out,
        model=ModelSettings(layers=2, heads=2, width=16, context=16),
        optimizer=OptimizerSettings(**optimizer),
        schedule=ScheduleSettings(steps=2),
        batch=BatchSettings(tokens_per_step=16 * rows, micro_batch=size),
    )
    here = World(rank=0, size=1, device=torch.device("cpu"))
    return session.start(settings, here, lambda text: None)


# ---- what fits


@pytest.mark.parametrize(("fits", "expected"), [(100, 12), (12, 12), (11, 6), (6, 6), (5, 4), (3, 3), (2, 2), (1, 1)])
def test_auto_takes_the_largest_divisor_that_fits(tmp_path, data, monkeypatch, fits, expected):
    """Memory is made to cost 1 GiB a sequence, of which four fifths of what is free may be taken."""
    monkeypatch.setattr(micro_batch, "_estimate", lambda session, size: size * GIB)
    monkeypatch.setattr(micro_batch, "free_memory", lambda: int(fits * GIB / 0.8) + 1000)
    assert session_of(data, tmp_path / "run").stepper.micro_batch == expected


def test_nothing_fits(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(micro_batch, "free_memory", lambda: 1000)
    assert runs.train(data, tmp_path / "run", micro_batch="auto") == 2
    said = capsys.readouterr().err
    assert re.search(r"needs about 0\.\d\d GiB with one sequence at a time, and 0\.00 GiB are free", said)
    assert "--activation-checkpointing" in said
    assert not (tmp_path / "run").exists()


def test_a_system_that_does_not_tell_gets_everything_at_once(tmp_path, data, monkeypatch):
    monkeypatch.setattr(micro_batch, "free_memory", lambda: None)
    assert session_of(data, tmp_path / "run").stepper.micro_batch == 12


def test_the_estimate_is_that_of_the_plan(tmp_path, data):
    run = session_of(data, tmp_path / "run", optimizer="lion")
    expected = plan.step_memory(run.config, micro_batch=3, optimizer="lion").total
    assert micro_batch._estimate(run, 3) == expected


def test_free_memory_is_that_of_this_machine():
    found = micro_batch.free_memory()
    assert found is None or 2**20 < found < 2**50


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch, "_CGROUP", tmp_path)
    whole = micro_batch.free_memory()
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 400000\n")
    assert micro_batch.free_memory() == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert micro_batch.free_memory() == pytest.approx(whole, rel=0.5)


# ---- running out after all


def out_of_memory_above(monkeypatch, limit, *, error=None):
    """Forward passes of more than `limit` sequences find no memory; returns the sizes that were asked for."""
    forward, asked = GPT.forward, []

    def limited(self, tokens, *rest):
        if self.training:
            asked.append(len(tokens))
            if len(tokens) > limit:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, tokens, *rest)

    monkeypatch.setattr(GPT, "forward", limited)
    return asked


def cpu_error():
    """What PyTorch's CPU allocator really says."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "adamw"])
def test_auto_backs_off_and_the_run_is_that_of_the_smaller_size(tmp_path, data, monkeypatch, capsys, optimizer):
    """Out of memory in the middle of a step, and in a curvature refresh: both are done again as if never begun."""
    flags = {"optimizer": optimizer, "dropout": 0.0, "curvature-interval": 3 if "sophia" in optimizer else None}
    flags |= {"curvature-chunks": 4} if optimizer == "sophia-g" else {}
    assert runs.train(data, tmp_path / "small", micro_batch=2, **flags) == 0
    capsys.readouterr()
    asked = out_of_memory_above(monkeypatch, 2, error=cpu_error())
    assert runs.train(data, tmp_path / "run", micro_batch="auto", **flags) == 0
    said = capsys.readouterr().out
    assert "memory ran out with 6 sequences at a time: going on with 3" in said
    assert "memory ran out with 3 sequences at a time: going on with 2" in said
    assert len([size for size in asked if size > 2]) == 2
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (runs.latest(tmp_path / run) / name for run in ("run", "small"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert [line for line in runs.metrics(tmp_path / "run") if "lr" in line] == [
        line for line in runs.metrics(tmp_path / "small") if "lr" in line
    ]


def test_on_a_gpu_sizes_are_tried_and_leave_nothing(tmp_path, data, monkeypatch):
    """Two micro-batches of each size, from the largest on; here on the CPU."""
    run = session_of(data, tmp_path / "run", optimizer="sophia-g")
    before = [p.clone() for p in run.model.parameters()]
    asked = out_of_memory_above(monkeypatch, 4)
    assert micro_batch._tried(run.stepper, run, [12, 6, 4, 3, 2, 1]) == run.stepper.micro_batch == 4
    assert asked == [12, 6, 4, 4]
    assert all(p.grad is None for p in run.model.parameters())
    assert run.optimizers.curvature_due
    for p, q in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(ValueError, match="not even one sequence of 16 tokens fits cpu"):
        micro_batch._tried(run.stepper, run, [2, 1])


def test_a_resume_goes_on_with_what_was_left(tmp_path, data, monkeypatch, capsys):
    asked = out_of_memory_above(monkeypatch, 2)
    runs.crash_at(monkeypatch, 7)
    runs.through_crashes(data, tmp_path / "run", **{"micro-batch": "auto", "optimizer": "adamw"})
    assert (asked.count(6), asked.count(3)) == (1, 1)


def test_a_size_that_was_asked_for_is_not_changed(tmp_path, data, monkeypatch, capsys):
    out_of_memory_above(monkeypatch, 2)
    assert runs.train(data, tmp_path / "run", micro_batch=4) == 2
    said = capsys.readouterr().err
    assert "memory ran out on cpu with 4 sequences at a time (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert said.endswith("resume with --micro-batch 3\n")
    assert runs.resume(tmp_path / "run", micro_batch=2) == 0


def test_the_last_resorts(tmp_path, data, monkeypatch, capsys):
    out_of_memory_above(monkeypatch, 0)
    assert runs.train(data, tmp_path / "run", micro_batch="auto") == 2
    assert capsys.readouterr().err.endswith("resume with --activation-checkpointing\n")
    assert runs.resume(tmp_path / "run", activation_checkpointing=True) == 2
    assert "start a new run with a smaller --model or --context" in capsys.readouterr().err


def test_memory_that_runs_out_elsewhere_is_told_as_well(tmp_path, data, monkeypatch, capsys):
    def step(self, skip):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("sophia.optimizers.Optimizers.step", step)
    assert runs.train(data, tmp_path / "run", micro_batch="auto") == 2
    assert "memory ran out on cpu with 6 sequences" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_it(tmp_path, data, monkeypatch):
    out_of_memory_above(monkeypatch, 2, error=RuntimeError("the model is wrong"))
    with pytest.raises(RuntimeError, match="the model is wrong"):
        runs.train(data, tmp_path / "run", micro_batch="auto")


# ---- the same result


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_only_change_the_order_of_sums(tmp_path, data, size):
    """Also where the last one is smaller than the others."""
    whole, parts = (session_of(data, tmp_path / str(s), rows=6, size=s, optimizer="adamw") for s in (6, size))
    inputs, targets = whole.batches.step(3)
    for run in (whole, parts):
        for p in run.model.parameters():
            p.grad = torch.full_like(p, 7.0)  # what an earlier step left
    loss, same = (s.stepper.gradients(inputs, targets, index=3).item() for s in (whole, parts))
    assert loss == pytest.approx(same, rel=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_the_mean_loss(tmp_path, data):
    run = session_of(data, tmp_path / "run", rows=6, size=4, optimizer="adamw")
    inputs, targets = run.batches.step(0)
    loss = run.stepper.gradients(inputs, targets, index=0)
    found = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    expected = torch.nn.functional.cross_entropy(run.model(inputs).flatten(0, 1), targets.flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for ours, p in zip(found, run.model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-7)


# ---- curvature chunks


def test_chunks_fit_into_a_micro_batch(tmp_path, data):
    """As many as keep each within it, and at least the usual four."""
    for size, expected in ((12, 4), (3, 4), (2, 6), (1, 12)):
        run = session_of(data, tmp_path / str(size), size=size, optimizer="sophia-g", curvature_rows=12)
        assert run.settings.optimizer.curvature_chunks == expected
        inputs, targets = run.batches.step(0)
        chunks = run.stepper.curvature_batch(inputs, targets).chunks
        assert max(chunks.count(chunk) for chunk in chunks) <= size


def test_fewer_chunks_than_that_are_refused(tmp_path, data, capsys):
    flags = {"tokens_per_step": 192, "curvature_rows": 12, "curvature_chunks": 2, "micro_batch": 4}
    assert runs.train(data, tmp_path / "run", **flags) == 2
    said = capsys.readouterr().err
    assert "curvature_chunks 2 makes chunks of 6 sequences, and each rank computes 4 at a time" in said
    assert "choose at least 3" in said
    assert not (tmp_path / "run").exists()


def test_the_number_of_chunks_is_part_of_the_run(tmp_path, data, monkeypatch):
    """What memory there is at a resume does not change the estimate."""
    flags = {"micro_batch": 1, "curvature_rows": 6, "optimizer": "sophia-g"}
    assert runs.train(data, tmp_path / "run", **flags) == 0
    assert "curvature_chunks = 6" in (tmp_path / "run" / "config.toml").read_text()


# ---- torch.compile


def test_on_a_cpu_auto_does_not_compile_and_says_nothing(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    assert runs.train(data, tmp_path / "run", compile="auto", steps=3) == 0
    assert "compile" not in capsys.readouterr().out


def test_without_a_compiler_on_is_refused(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert runs.train(data, tmp_path / "run", compile="on") == 2
    assert "compile is on, but torch.compile cannot work here: there is no C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compiled_and_eager_learn_the_same(tmp_path, data, monkeypatch):
    """Without code generation, which takes a minute: `python -m tests.soak.kills` has the whole compiler."""
    compiled = []

    def capture(self, **options):
        compiled.append(options)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    monkeypatch.setattr(session, "_compile_obstacle", lambda device: None)
    for name, choice in (("eager", "off"), ("compiled", "on")):
        assert runs.train(data, tmp_path / name, steps=4, dropout=0.0, compile=choice) == 0
    assert compiled == [{"dynamic": False}]
    ours, theirs = (runs.metrics(tmp_path / name) for name in ("eager", "compiled"))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
