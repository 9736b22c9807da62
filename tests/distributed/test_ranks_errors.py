"""What goes wrong on one rank is known on all: each raises or refuses, none waits, nothing is changed."""

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from tests.distributed import engines

ENGINES = [("ddp", 2), ("fsdp", 2), ("ddp", 4)]


class Scene:
    """A model and an optimizer between backward and step, on every rank; rank 1 is the one with the fault."""

    def __init__(self, engine, kind=SophiaG, **options):
        self.rank, _ = engines.place()
        self.model = engines.wrap(engine, engines.build(torch.float32), **options)
        self.optimizer = kind(self.model.parameters(), lr=1e-2, curvature_interval=2)
        self.own = engines.own_rows()
        self.tokens, self.targets = (t[self.own] for t in engines.batch())
        for _ in range(2):  # DDP's second forward takes part in a collective call of its own, to arrange its buckets
            self.model.zero_grad()
            self.loss().backward()
        self.before = engines.snapshot(self.model, self.optimizer)

    def logits(self):
        return self.model(self.tokens)

    def loss(self):
        return F.cross_entropy(self.logits().flatten(0, 1), self.targets.flatten())

    def attempt(self, *args, **kwargs):
        """What refresh_curvature does: its result, or the name and text of its exception."""
        try:
            return self.optimizer.refresh_curvature(*args, **kwargs)
        except Exception as problem:
            return type(problem).__name__, str(problem)

    def check_unchanged(self, refused=0):
        """Nothing has moved, the refresh is still due, and the next one and a step go well."""
        engines.assert_same(engines.snapshot(self.model, self.optimizer), self.before)
        assert self.optimizer.curvature_due
        assert self.optimizer.stats()["refused_refreshes"] == refused
        healthy = self.loss if isinstance(self.optimizer, SophiaH) else self.logits
        assert self.optimizer.refresh_curvature(healthy)
        self.optimizer.step()
        assert all(value.isfinite().all() for value in engines.snapshot(self.model, self.optimizer).values())


def raise_lookup_error(*_):
    raise LookupError("lost on rank 1")


def wrong_mask(scene):
    return scene.logits(), torch.ones(3, 2, dtype=torch.bool)


def mask_of_floats(scene):
    return scene.logits(), torch.ones(len(scene.own), engines.CONTEXT)


def no_logits(scene):
    scene.logits()
    return "four"


def scalar(scene):
    return scene.logits().sum()


def without_gradient(scene):
    return scene.logits().detach()


def failing_after_the_model(scene):
    scene.logits()
    raise_lookup_error()


def failing_before_the_model(scene):
    raise_lookup_error()


def failing_inside_the_model(scene):
    handle = scene.model.module.block.up.register_forward_hook(raise_lookup_error)
    try:
        return scene.logits()
    finally:
        handle.remove()


FAULTS = {
    wrong_mask: ("ValueError", "(3, 2)"),
    mask_of_floats: ("ValueError", "torch.bool"),
    no_logits: ("ValueError", "str"),
    scalar: ("ValueError", "scalar"),
    without_gradient: ("ValueError", "no gradient"),
    failing_after_the_model: ("LookupError", "lost on rank 1"),
    failing_before_the_model: ("LookupError", "lost on rank 1"),
    failing_inside_the_model: ("LookupError", "lost on rank 1"),
}


def refresh_with_a_fault(engine, fault, position, kind=SophiaG):
    """The fault is in one of three forwards of rank 1."""
    scene = Scene(engine, kind)
    healthy = scene.loss if kind is SophiaH else scene.logits
    forwards = [healthy, healthy, healthy]
    if scene.rank == 1:
        forwards[position] = lambda: fault(scene)
    outcome = scene.attempt(forwards)
    scene.check_unchanged()
    return outcome


def assert_all_know(outcomes, name, text):
    assert outcomes[1][0] == name
    assert text in outcomes[1][1]
    for other in outcomes[:1] + outcomes[2:]:
        assert other[0] == "RuntimeError"
        assert "failed on rank [1]" in other[1]


# Under FSDP2 a rank that fails before its part of the forward is over leaves the others waiting for its shards, inside
# torch, as in training.
CASES = [
    *(("ddp", 2, fault, position) for fault in FAULTS for position in (0, 2)),
    *(("ddp", 4, fault, 0) for fault in (wrong_mask, failing_inside_the_model)),
    *(("fsdp", 2, f, 2) for f in FAULTS if f not in (failing_before_the_model, failing_inside_the_model)),
]


@pytest.mark.parametrize(("engine", "world", "fault", "position"), CASES)
def test_a_forward_that_fails_on_one_rank(ranks, engine, world, fault, position):
    assert_all_know(ranks.run(refresh_with_a_fault, engine, fault, position, world=world), *FAULTS[fault])


def vector_loss(scene):
    return scene.logits().sum(-1)


@pytest.mark.parametrize("fault", [failing_after_the_model, vector_loss])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_loss_that_fails_on_one_rank(ranks, engine, fault):
    expected = {vector_loss: ("ValueError", "scalar mean loss"), **FAULTS}[fault]
    assert_all_know(ranks.run(refresh_with_a_fault, engine, fault, 1, SophiaH), *expected)


def refresh_with_wrong_arguments(engine, what):
    scene = Scene(engine)
    faulty = scene.rank == 1
    args, kwargs = [scene.logits], {}
    if what == "forwards" and faulty:
        args = [[scene.logits, scene.logits]]
    elif what == "no callable" and faulty:
        args = [[scene.logits, None]]
    elif what == "tensor" and faulty:
        args = [scene.tokens]
    elif what == "rows":
        kwargs["rows"] = [*scene.own, 99] if faulty else scene.own
    elif what == "kind of rows":
        kwargs["rows"] = [0.5] * len(scene.own) if faulty else scene.own
    elif what == "nothing counts":
        args = [lambda: (scene.logits(), torch.zeros(len(scene.own), engines.CONTEXT, dtype=torch.bool))]
    outcome = scene.attempt(*args, **kwargs)
    scene.check_unchanged()
    return outcome


@pytest.mark.parametrize("what", ["no callable", "tensor", "rows", "kind of rows"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_arguments_that_are_wrong_on_one_rank(ranks, engine, what):
    text = {"no callable": "callable", "tensor": "callable", "rows": "rows", "kind of rows": "rows"}[what]
    assert_all_know(ranks.run(refresh_with_wrong_arguments, engine, what), "ValueError", text)


@pytest.mark.parametrize(
    ("what", "text"), [("forwards", "[1, 2] forwards"), ("nothing counts", "no prediction counts")]
)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_arguments_that_are_wrong_together(ranks, engine, what, text):
    for name, message in ranks.run(refresh_with_wrong_arguments, engine, what):
        assert name == "ValueError"
        assert text in message


def refresh_with_a_number(engine, kind, number):
    """One output of rank 1 is not finite."""
    scene = Scene(engine, kind)
    spoilt = torch.ones(engines.VOCAB)
    if scene.rank == 1:
        spoilt[2] = number
    targets = scene.targets.flatten()

    def forward():
        logits = scene.logits() * spoilt
        return logits if kind is SophiaG else F.cross_entropy(logits.flatten(0, 1), targets)

    outcomes = [scene.attempt(forward), scene.attempt(forward)]
    scene.check_unchanged(refused=2)
    return outcomes


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
@pytest.mark.parametrize(("engine", "world"), ENGINES)
def test_an_estimate_that_is_not_finite_on_one_rank(ranks, engine, world, kind, number):
    for outcomes in ranks.run(refresh_with_a_number, engine, kind, number, world=world):
        assert outcomes == [False, False]
