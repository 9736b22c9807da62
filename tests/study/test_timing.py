"""What updates cost: nothing is forgotten, and a busy machine does not decide."""

import json
import math
import os
import time
from dataclasses import replace

import pytest
import torch

from sophia import session
from sophia.accounting import curvature_share, flops_per_token
from sophia.distributed import World
from sophia.optimizers import Optimizers
from sophia.study import flops, timed_case, timing
from sophia.study.alone import alone
from sophia.study.one_run import train_settings
from sophia.study.plan import AblationCell, Cell, Plan, Trial
from sophia.study.timed_case import Case, Stepping, weigh
from tests.study import tiny
from tests.train import runs

HERE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


def plan_of(*specs, ablations=()):
    """A plan in which these are the best."""
    cells = [
        Cell(
            optimizer=spec.optimizer,
            steps=spec.steps,
            tokens_per_step=spec.tokens_per_step,
            trials=(Trial(spec=replace(spec, seed=0), loss=1.0, finished=True, why="grid"),),
            best=spec.settings,
            edges=(),
            finals=(spec,),
        )
        for spec in specs
    ]
    changed = [
        AblationCell(name=name, of=spec.optimizer, trials=(), best=spec.settings, finals=(spec,))
        for name, spec in ablations
    ]
    return Plan(cells=tuple(cells), ablations=tuple(changed), wanted=(), steps_left=0, done=True)


@pytest.fixture
def place(tmp_path, data, monkeypatch):
    """Nothing takes long; memory is not measured."""
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr("sophia.study.timed_case._LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "alone", lambda function, *arguments: function(*arguments))
    return timing.Place(data=data, out=tmp_path)


def test_a_training_step_counts_what_accounting_counts(tmp_path, data):
    going = session.start(
        train_settings(tiny.study(data), tiny.spec("muon"), data=data, out=tmp_path / "run"), HERE, print
    )
    inputs, targets = going.batches.step(0)
    counted = flops.count(lambda: going.stepper.gradients(inputs, targets, index=0))
    assert counted == 32 * flops_per_token(going.config)
    going.optimizers.set_lr(1.0)
    # Five Newton-Schulz iterations of three products on matrices m × n, m the smaller side, in each block's four.
    shapes = [(16, 48), (16, 16), (16, 64), (16, 64)]
    assert flops.count(going.optimizers.step) == sum(5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n) for m, n in shapes)


# Of each matrix in the block: the sides that are turned, and the other one.
SIDES = {
    "smaller": [([16], 48), ([16], 16), ([16], 64), ([16], 64)],
    "both": [([48, 16], None), ([16, 16], None), ([64, 16], None), ([16, 64], None)],
}


@pytest.mark.parametrize("basis", ["smaller", "both"])
def test_products_and_decompositions_of_sophia_k_are_counted(tmp_path, data, basis):
    """Beyond Sophia-G's work, by hand: n numbers of a matrix times a turned side k are a product of 2 n k."""
    counts = {}
    for name, values in (
        ("sophia-g", {"curvature_noise": "signs"}),
        ("sophia-k", {"basis": basis, "split_qkv": False}),
    ):
        spec = tiny.spec(name, curvature_interval=1, curvature_rows=3, curvature_chunks=3, **values)
        settings = train_settings(tiny.study(data), spec, data=data, out=tmp_path / name)
        going = session.start(settings, HERE, print)
        inputs, targets = going.batches.step(0)
        going.optimizers.set_lr(1.0)

        def refresh(stepper=going.stepper, inputs=inputs, targets=targets):
            stepper.refresh(inputs, targets)

        refresh()  # the first one of Sophia-K makes two passes
        going.stepper.gradients(inputs, targets, index=0)
        step = flops.count(going.optimizers.step)
        counts[name] = step, flops.count(refresh)
    matrices = [(turned, math.prod(turned) if other is None else turned[0] * other) for turned, other in SIDES[basis]]
    step = sum(2 * 2 * n * k for turned, n in matrices for k in turned)  # into the basis and back
    step += sum(5 * (4 * n * 16 + 2 * 16**3) for _, n in matrices)  # Newton-Schulz: the smaller side is 16
    assert (counts["sophia-g"][0], counts["sophia-k"][0]) == (0, step)
    chunks = sum(3 * (2 * n * k + 2 * n * k) for turned, n in matrices for k in turned)  # outer products, squares
    # Statistics times basis, its QR decomposition, overlaps of old and new, and the diagonal taken along.
    bases = sum(2 * k**3 + 8 * k**3 // 3 + 2 * k**3 + 2 * n * k for turned, n in matrices for k in turned)
    assert counts["sophia-k"][1] - counts["sophia-g"][1] == chunks + bases


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h"])
def test_curvature_is_counted(tmp_path, data, optimizer):
    """On the average over a round, at the share of the training steps that accounting tells."""
    study = tiny.study(data)
    case = Case(name=optimizer, spec=tiny.spec(optimizer, curvature_interval=5, curvature_rows=2))
    going = Stepping(study, case, data=data, folder=tmp_path / "run", here=HERE)
    plain = 32 * flops_per_token(going.session.config)
    counted = flops.count(lambda: going.run(10))
    going.close()
    assert going.refreshes == 2
    share = (counted - 10 * plain) / (10 * plain)
    rows = 2 / 4
    expected = curvature_share(optimizer, rows_fraction=rows, interval=5)
    if optimizer == "sophia-h":
        expected *= 2 / 3  # by finite differences: two gradients
    assert share == pytest.approx(expected, rel=0.15)


def test_no_update_waits_for_what_would_be_told(tmp_path, data, monkeypatch):
    """Where curvature follows the update, its clipped fraction is asked for before; the others' is never timed."""
    asked = []
    monkeypatch.setattr(Optimizers, "clip_fraction", lambda _: asked.append(1))
    case = Case(name="after", spec=tiny.spec("sophia-g", refresh_when="after"))
    going = Stepping(tiny.study(data), case, data=data, folder=tmp_path / "run", here=HERE)
    going.run(1)
    asked.clear()
    going.run(30)
    going.close()
    assert not asked


def test_decompositions_are_counted():
    square = torch.randn(12, 12)
    assert flops.count(lambda: torch.linalg.qr(square)) == 8 * 12**3 // 3
    assert flops.count(lambda: torch.linalg.eigh(square @ square.T)) == 9 * 12**3 + 2 * 12**3
    total = torch.zeros(3, 5)
    assert flops.count(lambda: total.addmm_(torch.ones(3, 4), torch.ones(4, 5))) == 2 * 3 * 4 * 5


def test_what_is_timed(data):
    study = tiny.study(data, other_batches=(64,))
    adamw, sophia = tiny.spec(), tiny.spec("sophia-g")
    other = replace(adamw, steps=10, tokens_per_step=64)
    half = replace(adamw, steps=10)
    ablations = [
        ("interval", tiny.spec("sophia-g", curvature_interval=1)),
        ("eps", tiny.spec("sophia-g", eps=1e-7, beta2=0.9)),
        ("auto", tiny.spec("sophia-g", gamma="auto")),
    ]
    plan = plan_of(adamw, half, other, sophia, ablations=ablations)
    found = timing.cases(study, plan)
    assert [(case.name, case.spec.tokens_per_step) for case in found] == [
        ("adamw", 32),
        ("adamw", 64),
        ("sophia-g", 32),
        ("interval", 32),
        ("auto", 32),
    ]
    assert all(case.spec.tokens == study.race.tokens for case in found)
    unknown = replace(plan, cells=tuple(replace(cell, best=None) for cell in plan.cells), ablations=())
    assert timing.cases(study, unknown) == []
    others = replace(plan, cells=tuple(cell for cell in plan.cells if cell.tokens_per_step == 32))
    assert len(timing.cases(study, others)) == 4
    assert timing.cases(study, replace(plan, cells=plan.cells[2:])) == [found[1]]


def test_rounds_in_turn_with_ratios_within_each(place, data, monkeypatch):
    """A machine that gets ten times slower from round to round changes no ratio."""
    order = []

    def round_(self):
        name = self.session.settings.optimizer.optimizer
        self.run(self.steps)
        order.append(name)
        turn = (len(order) - 1) // 3
        ratio = {"adamw": 1.0, "sophia-g": (1.2, 1.5, 1.8, 1.5, 1.4, 1.6)[turn], "lion": 0.5}[name]
        return ratio * 10.0**turn * self.steps

    monkeypatch.setattr(Stepping, "round", round_)
    monkeypatch.setattr(Stepping, "warm_up", lambda self: self.run(self.steps))
    specs = [tiny.spec(), tiny.spec("sophia-g", curvature_interval=5), tiny.spec("lion")]
    study = tiny.study(data, optimizers=("adamw", "sophia-g", "lion"))
    costs = timing.measure(study, plan_of(*specs), place)
    assert order[:6] == ["adamw", "sophia-g", "lion", "lion", "sophia-g", "adamw"]
    assert len(order) == 3 * timing.LEAST_ROUNDS
    adamw, sophia, lion = costs
    assert (adamw.ratio, adamw.ratio_low, adamw.ratio_high) == (1.0, 1.0, 1.0)
    assert (sophia.ratio, sophia.ratio_low, sophia.ratio_high) == pytest.approx((1.5, 1.2, 1.8))
    assert lion.rounds == timing.LEAST_ROUNDS
    assert lion.ratio == pytest.approx(0.5)
    assert adamw.seconds_per_step == pytest.approx((1e2 + 1e3) / 2)  # the median of 1, 10, … 1e5
    assert [cost.settings for cost in costs] == [spec.settings for spec in specs]
    assert (adamw.refreshes_per_round, sophia.refreshes_per_round, sophia.steps_per_round) == (None, 2, 10)
    plain = flops_per_token(config_of(study, specs[0], data)) * 32
    assert adamw.flops_per_step == lion.flops_per_step == plain
    assert sophia.flops_per_step > 1.03 * plain


def config_of(study, spec, data):
    folder = data.parent / f"config-{time.monotonic_ns()}"
    return session.start(train_settings(study, spec, data=data, out=folder), HERE, print).config


def test_it_is_measured_once(place, data, monkeypatch):
    study, plan = tiny.study(data), plan_of(tiny.spec(), tiny.spec("sophia-g"))
    assert timing.read(study, plan, place.out) == []
    costs = timing.measure(study, plan, place)
    assert not list((place.out / "work").glob("*"))
    monkeypatch.setattr(Stepping, "__init__", None)
    assert timing.measure(study, plan, place) == costs
    faster = plan_of(tiny.spec(lr=1e-4), tiny.spec("sophia-g", gamma=0.3))
    assert timing.measure(study, faster, place) == costs  # costs the same
    other = plan_of(tiny.spec(), tiny.spec("sophia-g", curvature_interval=1))
    assert timing.read(study, other, place.out) == costs[:1]
    with pytest.raises(TypeError):
        timing.measure(study, other, place)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 7}', '{"format": 1, "costs": [{}]}'])
def test_a_damaged_file(place, data, content):
    (place.out / timing.FILE).write_text(content)
    with pytest.raises(ValueError, match=r"timing.json is damaged .*: delete it, and it is measured again"):
        timing.measure(tiny.study(data), plan_of(tiny.spec()), place)


def test_the_file_says_on_what_it_was_made(place, data):
    timing.measure(tiny.study(data), plan_of(tiny.spec()), place)
    content = json.loads((place.out / timing.FILE).read_text())
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert len(content["costs"][0]["seconds"]) == timing.LEAST_ROUNDS


def test_memory_of_a_larger_model_is_larger(data, tmp_path):
    """In a process of its own: ten million parameters of AdamW are at least 160 MB with gradients and two moments."""
    study = tiny.study(data)
    study = replace(study, model=replace(study.model, layers=2, width=640, heads=2))
    case = Case(name="adamw", spec=replace(tiny.spec(), tokens_per_step=8))
    found = alone(weigh, study, case, data, tmp_path, 1)
    numbers = 12 * 2 * 640**2
    assert 16 * numbers < found["peak_memory_bytes"] < 40 * numbers
    assert found["flops_per_step"] > 8 * 6 * numbers


def test_memory_is_that_of_the_optimizer_and_not_of_its_compiler(data, tmp_path):
    """Two moments, the gradient, and an estimate with the gradient that it is made from: six numbers a parameter."""
    study = tiny.study(data)
    study = replace(study, model=replace(study.model, layers=2, width=320, heads=2))
    case = Case(name="sophia-g", spec=replace(tiny.spec("sophia-g"), tokens_per_step=8))
    numbers = 12 * 2 * 320**2
    found = alone(weigh, study, case, data, tmp_path, 1)
    assert 16 * numbers < found["peak_memory_bytes"] < 40 * numbers


@pytest.mark.parametrize(
    ("optimizer", "interval", "steps"),
    [("soap", {}, 11), ("sophia-g", {"curvature_interval": 4}, 21), ("sophia-k", {}, 11)],
)
def test_memory_has_curvature_and_bases_beside_the_state(data, tmp_path, monkeypatch, optimizer, interval, steps):
    seen, own = [], Stepping.run

    def noted(stepping, count):
        own(stepping, count)
        seen.append(stepping.trainer.progress.step)

    monkeypatch.setattr(Stepping, "run", noted)
    monkeypatch.setattr(timed_case, "_peak", lambda _: seen.append("peak"))
    weigh(tiny.study(data), Case(name=optimizer, spec=tiny.spec(optimizer, **interval)), data, tmp_path, 1)
    assert seen[seen.index("peak") - 1] == steps


def test_what_a_process_of_its_own_says(tmp_path):
    with pytest.raises(ValueError, match=r"exit code 9 .*start the study again"):
        alone(os._exit, 9)
    with pytest.raises(ValueError, match=r"No such file or directory: '.*missing'"):
        alone(os.stat, str(tmp_path / "missing"))
