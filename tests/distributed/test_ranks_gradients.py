"""Trap 13: a refresh leaves `.grad`, and whatever an engine keeps of gradients elsewhere, as it found them."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from tests.distributed import engines

# A bucket for each parameter, or one for all; with static_graph the first backward pass is unlike all others.
DDP_OPTIONS = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "views, one parameter a bucket": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-6},
    "views, static graph": {"gradient_as_bucket_view": True, "static_graph": True},
    "views, an unused parameter": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
}


def training_loss(model, step=0):
    tokens, targets = engines.batch(step)
    own = engines.own_rows()
    return F.cross_entropy(model(tokens[own]).flatten(0, 1).float(), targets[own].flatten())


def forward_of(optimizer, model, step=0):
    tokens, _ = engines.batch(step)
    own = engines.own_rows()
    return (lambda: training_loss(model, step)) if isinstance(optimizer, SophiaH) else (lambda: model(tokens[own]))


def train(engine, options, kind, when):
    """Five steps with a refresh at each, before, amid or after forward and backward; what each step left."""
    spare = "find_unused_parameters" in options
    model = engines.wrap(engine, engines.build(torch.float32, spare=spare), **options)
    if spare:
        model.register_forward_pre_hook(lambda _, args: (*args, False))
    optimizer = kind(model.parameters(), lr=1e-2, curvature_interval=1, seed=3)
    history = []
    for step in range(5):
        if when == "before the forward":
            assert optimizer.refresh_curvature(forward_of(optimizer, model, step))
        loss = training_loss(model, step)
        if when == "before the backward":
            assert optimizer.refresh_curvature(forward_of(optimizer, model, step))
        loss.backward()
        gradients = {name: value for name, value in engines.snapshot(model).items() if name.endswith(".grad")}
        random_state = torch.get_rng_state()
        if when == "after the backward":
            assert optimizer.refresh_curvature(forward_of(optimizer, model, step))
        assert torch.equal(torch.get_rng_state(), random_state)
        for name, value in gradients.items():
            assert torch.equal(engines.snapshot(model)[name], value), name
        optimizer.step()
        history.append(engines.snapshot(model, optimizer))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return history


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
@pytest.mark.parametrize("options", DDP_OPTIONS)
def test_under_ddp(ranks, options, kind):
    before = ranks.run(train, "ddp", DDP_OPTIONS[options], kind, "before the forward")
    after = ranks.run(train, "ddp", DDP_OPTIONS[options], kind, "after the backward")
    for rank, history in enumerate(after):
        for step, snapshot in enumerate(history):
            engines.assert_same(snapshot, before[rank][step])


# Not under DDP: its reducer takes the first backward pass after a forward for that forward's own.
@pytest.mark.parametrize("when", ["before the backward", "after the backward"])
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_under_fsdp2(ranks, kind, when):
    before = ranks.run(train, "fsdp", {}, kind, "before the forward")
    for history in ranks.run(train, "fsdp", {}, kind, when):
        for step, snapshot in enumerate(history):
            engines.assert_same(snapshot, before[0][step])


BF16_COMPUTE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def accumulate(engine, options, *, training, refreshing):
    """Gradients of two micro-batches, the second of which reduces both, and between them a refresh."""
    model = engines.wrap(engine, engines.build(torch.float32), **options)
    optimizer = SophiaG(model.parameters())
    if training:
        with unreduced(engine, model):
            training_loss(model, 0).backward()
    if refreshing:
        assert optimizer.refresh_curvature(forward_of(optimizer, model))
    if training:
        training_loss(model, 1).backward()
    return engines.snapshot(model, optimizer)


@contextlib.contextmanager
def unreduced(engine, model):
    with model.no_sync() if engine == "ddp" else contextlib.nullcontext():
        if engine == "fsdp":
            model.set_requires_gradient_sync(False)
        yield
        if engine == "fsdp":
            model.set_requires_gradient_sync(True)


def accumulate_both_apart_and_together(engine, options):
    return [
        accumulate(engine, options, training=training, refreshing=refreshing)
        for training, refreshing in ((True, False), (False, True), (True, True))
    ]


@pytest.mark.parametrize(
    ("engine", "options"),
    [("ddp", {}), ("ddp", {"gradient_as_bucket_view": True}), ("fsdp", {}), ("fsdp", {"mp_policy": BF16_COMPUTE})],
    ids=["ddp", "ddp-views", "fsdp", "fsdp-bf16"],
)
def test_between_micro_batches(ranks, engine, options):
    """With a reduce_dtype of its own, FSDP2 keeps unreduced gradients outside of `.grad`."""
    for gradients, curvature, together in ranks.run(accumulate_both_apart_and_together, engine, options):
        engines.assert_same(together, {**gradients, **curvature})


class Tower(nn.Module):
    """A net and a head that another optimizer trains."""

    def __init__(self):
        super().__init__()
        self.net = engines.build(torch.float32)
        self.head = nn.Parameter(torch.linspace(0.5, 1.5, engines.VOCAB))

    def forward(self, tokens):
        return self.net(tokens) * self.head


def train_with_two_optimizers(engine):
    model = engines.spread(engine, Tower())
    inner = [p for name, p in model.named_parameters() if "net." in name]
    optimizer = SophiaG(inner)
    training_loss(model).backward()
    before = engines.snapshot(model)
    assert optimizer.refresh_curvature(forward_of(optimizer, model))
    return before, engines.snapshot(model)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_gradients_of_another_optimizer(ranks, engine):
    for before, after in ranks.run(train_with_two_optimizers, engine):
        assert "head.grad" in before
        engines.assert_same(after, before)
