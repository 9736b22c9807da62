"""Optimizers by import path, with their hooks: trained, resumed, guarded, and every mistake told in one line."""

import pytest
import torch

from sophia import micro_batch, optimizers
from sophia.config import OptimizerSettings
from tests.train import foreigners, runs
from tests.train.test_train_guards import disturb, nan_gradient

OWN = "tests.train.foreigners"
UNTIDY = {"optimizer": f"{OWN}:Untidy", "lr": 1e-3, "weight-decay": 0.1, "hook": f"{OWN}:draw"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    runs.without_plots(monkeypatch)


def given(*arguments, **flags):
    """Flags, and --arguments with several values."""
    return [*runs.arguments(**flags), *(["--arguments", *arguments] if arguments else [])]


def test_torchs_adamw_by_import_path_is_adamw(tmp_path, data):
    """Same groups, decay, schedule, clipping: the same weights, bit for bit."""
    flags = {"lr": 3e-3, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "decay_by_name": "tokens.*=0.1"}
    flags["lr_by_name"] = "positions.*=0.5"
    assert runs.train(data, tmp_path / "own", optimizer="adamw", **flags) == 0
    words = given("fused=True", optimizer="torch.optim:AdamW", **flags)
    assert runs.sophia("train", "--data", data, "--out", tmp_path / "foreign", *words) == 0
    own, foreign = runs.weights(tmp_path / "own"), runs.weights(tmp_path / "foreign")
    assert all(torch.equal(own[name], foreign[name]) for name in own)
    losses = [[line.get("loss") for line in runs.metrics(tmp_path / name)] for name in ("own", "foreign")]
    assert losses[0] == losses[1]


def test_crashes_leave_no_trace_whatever_the_state_is_made_of(tmp_path, data, monkeypatch):
    flags = UNTIDY | {"dropout": 0.1, "checkpoint-interval": 3}
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    runs.crash_at(monkeypatch, 2, 5, 8, 11)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")
    groups = runs.state(runs.latest(tmp_path / "whole"))["optimizers"][0]
    kept = groups[0]["state"]["tokens.weight"]
    assert kept["count"] == {"plain": 12}
    assert kept["nested"]["dict"]["pair"]["tuple"][1]["list"][:2] == [{"plain": None}, {"plain": "text"}]


def test_an_update_that_is_not_finite_is_left_out(tmp_path, data, monkeypatch):
    """Before the optimizer sees it: as if there had been no step, also the first one."""
    disturb(monkeypatch, dict.fromkeys((0, 3), nan_gradient))
    assert runs.train(data, tmp_path / "run", **UNTIDY) == 0
    state = runs.state(runs.latest(tmp_path / "run"))
    assert state["progress"]["not_finite"] == 2
    assert state["optimizers"][0][0]["state"]["tokens.weight"]["count"] == {"plain": 10}
    assert all(bool(value.isfinite().all()) for value in runs.weights(tmp_path / "run").values())


def test_a_hook_sees_each_update_once_before_its_gradients(tmp_path, data, monkeypatch):
    foreigners.SEEN.clear()
    batches = []
    runs.before_batch(monkeypatch, lambda index: batches.append((index, len(foreigners.SEEN))))
    assert runs.train(data, tmp_path / "run", optimizer="adamw", hook=f"{OWN}:note") == 0
    seen = foreigners.SEEN
    assert [context.step for context in seen] == list(range(12))
    assert batches == [(index, index + 1) for index in range(12)]
    first = seen[0]
    assert first.inputs.shape == first.targets.shape == (6, 16)
    assert torch.equal(first.inputs[:, 1:], first.targets[:, :-1])
    assert isinstance(first.optimizer, torch.optim.AdamW)
    logits = first.logits(first.inputs)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), first.targets.flatten())
    torch.testing.assert_close(first.loss(first.inputs, first.targets), wanted)
    assert wanted.requires_grad


def test_a_hook_is_called_once_even_if_memory_runs_out(tmp_path, data, monkeypatch):
    foreigners.SEEN.clear()
    failures = [torch.OutOfMemoryError("out of memory")]

    def act(index):
        if index == 3 and failures:
            raise failures.pop()

    runs.before_batch(monkeypatch, act)
    monkeypatch.setattr(micro_batch, "largest", lambda stepper, session: 6)
    assert runs.train(data, tmp_path / "run", optimizer="adamw", hook=f"{OWN}:note", micro_batch=None) == 0
    assert not failures
    assert [context.step for context in foreigners.SEEN] == list(range(12))


def test_sophia_by_import_path_gets_its_curvature_from_the_hook(tmp_path, data):
    """The trainer's own refreshes are for its own Sophia; the hook's noise and phase survive a resume, too."""
    flags = {"optimizer": "sophia:SophiaG", "lr": 1e-3, "hook": f"{OWN}:refresh"}
    assert runs.train(data, tmp_path / "run", **flags) == 0
    group = runs.state(runs.latest(tmp_path / "run"))["optimizers"][0][0]["settings"]
    assert group["curvature_interval"] == 10
    lines = [line for line in runs.metrics(tmp_path / "run") if "clip_fraction" in line]
    assert all(0 < line["clip_fraction"] <= 1 for line in lines)


def test_a_foreign_sophia_is_left_to_its_hook_and_skips_on_the_host(monkeypatch):
    """Also on a device that is not waited for: a flag there would be nothing to a step that does not know it."""
    monkeypatch.setattr(optimizers, "_READ_AT_ONCE", frozenset())
    model = torch.nn.Linear(3, 2)
    chosen = OptimizerSettings(optimizer="sophia:SophiaG", lr=0.1)
    both = optimizers.Optimizers(chosen, model, seed=0)
    assert not both.curvature_due
    assert both.refreshes is None
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    both.step(skip=torch.tensor(1.0))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not both.parts[0].state


def test_a_constructor_of_keywords_takes_them_all(tmp_path, data):
    words = given("momentum=0.5", "nesterov=True", optimizer=f"{OWN}:Keywords", lr=1e-2, weight_decay=0.5)
    assert runs.sophia("train", "--data", data, "--out", tmp_path / "run", *words) == 0
    groups = runs.state(runs.latest(tmp_path / "run"))["optimizers"][0]
    assert {group["settings"]["momentum"] for group in groups} == {0.5}
    assert {group["settings"]["weight_decay"] for group in groups} == {0.0, 0.5}


def test_a_module_in_the_current_folder_is_found(tmp_path, data, monkeypatch):
    (tmp_path / "just_here_27.py").write_text("from torch.optim import SGD as Mine\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert runs.train(data, tmp_path / "run", optimizer="just_here_27:Mine", lr=1e-2) == 0
    (tmp_path / "settings.toml").write_text(
        '[optimizer]\noptimizer = "just_here_27:Mine"\nlr = 0.1\narguments = ["momentum=0.9"]\n', encoding="utf-8"
    )
    words = [*runs.arguments(), "--config", tmp_path / "settings.toml"]
    assert runs.sophia("train", "--data", data, "--out", tmp_path / "other", *words) == 0
    assert runs.state(runs.latest(tmp_path / "other"))["optimizers"][0][0]["settings"]["momentum"] == 0.9


def test_a_run_without_a_name_is_named_after_the_class(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = runs.arguments(optimizer="torch.optim:SGD", lr=0.1)
    assert runs.sophia("train", "--data", data, *words) == 0
    assert (tmp_path / "runs" / "nano-SGD-1" / "config.toml").is_file()


SGD = {"optimizer": "torch.optim:SGD", "lr": 0.1}
MISTAKES = [
    ({"optimizer": "torch.optim:SGD"}, [], "lr is open, and no preset knows torch.optim:SGD: give --lr"),
    ({"optimizer": "sofia", "lr": 0.1}, [], "or package.module:Class"),
    ({"optimizer": "no_such_27.thing:Class", "lr": 0.1}, [], "there is no module no_such_27: install it"),
    ({"optimizer": "torch.optim.nothing:Class", "lr": 0.1}, [], "there is no module torch.optim.nothing"),
    ({"optimizer": "torch.optim:AdamWW", "lr": 0.1}, [], "the module torch.optim has no AdamWW (did you mean AdamW?)"),
    ({"optimizer": "torch.optim:", "lr": 0.1}, [], "an import path is package.module:name"),
    ({"optimizer": f"{OWN}:NoOptimizer", "lr": 0.1}, [], "NoOptimizer is no class of a torch.optim.Optimizer"),
    ({"optimizer": f"{OWN}:draw", "lr": 0.1}, [], "draw is no class of a torch.optim.Optimizer"),
    ({"optimizer": f"{OWN}:BrokenConstructor", "lr": 0.1}, [], "BrokenConstructor(lr=0.1) raised KeyError: 'no luck'"),
    ({"optimizer": "torch.optim:LBFGS", "lr": 0.1}, [], "torch.optim:LBFGS needs a closure in step()"),
    ({"optimizer": f"{OWN}:NeedsClosure", "lr": 0.1}, [], "needs a closure"),
    ({"optimizer": f"{OWN}:TwoWeights", "lr": 0.1}, [], "TwoWeights has eval(), so it evaluates other weights than it"),
    ({"optimizer": f"{OWN}:WithoutRate", "lr": 0.1}, [], "keeps no lr in its param groups"),
    ({"optimizer": f"{OWN}:BrokenStep", "lr": 0.1}, [], "BrokenStep.step() raised RuntimeError: out of steps"),
    ({"optimizer": f"{OWN}:OddState", "lr": 0.1}, [], "tokens.weight/odd is a set, which a checkpoint cannot hold"),
    ({"optimizer": f"{OWN}:OddKey", "lr": 0.1}, [], "keeps state under 'all', which is no parameter"),
    (
        {"optimizer": f"{OWN}:OddGroup", "lr": 0.1},
        [],
        "the param groups of OddGroup have what a checkpoint cannot hold",
    ),
    ({"optimizer": f"{OWN}:OddDict", "lr": 0.1}, [], "the state dict of OddDict has 'more', which a checkpoint"),
    (
        SGD | {"beta1": 0.9, "beta2": 0.9},
        [],
        "beta1 has no meaning for torch.optim:SGD: its constructor takes no betas",
    ),
    ({"optimizer": "torch.optim:Adam", "lr": 0.1, "beta1": 0.9}, [], "beta1 is given without beta2"),
    ({"optimizer": "torch.optim:Rprop", "lr": 0.1, "weight_decay": 0.1}, [], "its constructor takes no weight_decay"),
    ({"optimizer": "torch.optim:Rprop", "lr": 0.1, "decay_by_name": "*=0"}, [], "decay_by_name has no meaning for"),
    (SGD | {"gamma": 0.1}, [], "gamma has no meaning for torch.optim:SGD"),
    (SGD | {"basis_interval": 3}, [], "basis_interval has no meaning for torch.optim:SGD"),
    (SGD | {"lr_by_name": "nothing=2"}, [], "lr_by_name: nothing matches no parameter"),
    (
        SGD,
        ["momentun=0.9"],
        "arguments: momentun has no meaning for torch.optim:SGD: its constructor takes no momentun ",
    ),
    (SGD, ["momentum"], "arguments: 'momentum' is not KEY=VALUE"),
    (SGD, ["momentum=fast"], "arguments: 'momentum=fast' is not KEY=VALUE"),
    (SGD, ["0=1"], "arguments: '0=1' is not KEY=VALUE"),
    (SGD, ["lr=0.2"], "arguments: 'lr=0.2' gives lr a second time"),
    (SGD, ["momentum=0.1", "momentum=0.2"], "gives momentum a second time"),
    (SGD, ["momentum=-1"], "torch.optim:SGD(lr=0.1, momentum=-1) raised ValueError: Invalid momentum value"),
    ({"optimizer": "adamw"}, ["eps=1e-6"], "arguments has no meaning for adamw"),
    ({"hook": "nothing"}, [], "hook is 'nothing'; an import path is package.module:name"),
    ({"hook": f"{OWN}:nothing"}, [], "has no nothing"),
    ({"hook": f"{OWN}:NOT_CALLABLE"}, [], "NOT_CALLABLE is a int: it must be a function of one HookContext"),
    ({"hook": f"{OWN}:broken_hook"}, [], "broken_hook in step 3 raised RuntimeError: the sky is falling"),
    ({"hook": f"{OWN}:easier_batch"}, [], "easier_batch in step 2 changed inputs or targets in place"),
]


@pytest.mark.parametrize(("flags", "more", "message"), MISTAKES, ids=[message[:60] for _, _, message in MISTAKES])
def test_a_mistake_is_told_in_one_line(tmp_path, data, capsys, flags, more, message):
    assert runs.sophia("train", "--data", data, "--out", tmp_path / "run", *given(*more, **flags)) == 2
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["just_bad_27", "just_needs_27"])
def test_a_module_that_cannot_be_imported(tmp_path, data, monkeypatch, capsys, name):
    (tmp_path / "just_bad_27.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "just_needs_27.py").write_text("import no_such_27\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert runs.train(data, tmp_path / "run", optimizer=f"{name}:Class", lr=0.1) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    wanted = {"just_bad_27": "cannot be imported: ZeroDivisionError", "just_needs_27": "its module needs no_such_27"}
    assert wanted[name] in said
    assert not (tmp_path / "run").exists()
