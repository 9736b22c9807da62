"""A refresh leaves everything but the curvature as it found it: gradients, random streams, graphs, memory."""

import gc
import random
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sophia import SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from tests.models import Classifier, assert_same, curvature, examples, same, seeded

ESTIMATORS = {
    "labels": GaussNewtonBartlett(),
    "signs in chunks": GaussNewtonBartlett(noise="signs", chunks=3),
    "double backward": Hutchinson(product="double_backward"),
    "finite difference": Hutchinson(product="finite_difference"),
}


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return ESTIMATORS[request.param]


def build(model, estimator, **settings):
    kind = SophiaG if isinstance(estimator, GaussNewtonBartlett) else SophiaH
    return kind(model.parameters(), estimator=estimator, **settings)


def forward(optimizer, model, x, y):
    """What the optimizer's estimator wants."""
    if isinstance(optimizer, SophiaG):
        return lambda: model(x)
    return lambda: F.cross_entropy(model(x), y)


# ---- gradients


def test_gradients_stay_the_same_objects_with_the_same_values(estimator):
    model, (x, y) = seeded(Classifier), examples()
    params = list(model.parameters())
    for index, p in enumerate(params):
        p.grad = None if index == 1 else torch.full_like(p, index + 0.5)
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
    optimizer = build(model, estimator)
    assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
    for p, (grad, value) in zip(params, before, strict=True):
        assert p.grad is grad
        assert same(p.grad, value)


def flat_gradients(model):
    """Gradients as views of one buffer, as DDP's gradient_as_bucket_view has them."""
    params = list(model.parameters())
    buffer = torch.arange(float(sum(p.numel() for p in params)))
    for p, part in zip(params, buffer.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    return buffer


def test_trap_13_gradients_that_are_views_keep_their_values(estimator):
    model, (x, y) = seeded(Classifier), examples()
    buffer = flat_gradients(model)
    values, whole = [p.grad.clone() for p in model.parameters()], buffer.clone()
    optimizer = build(model, estimator)
    assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
    assert_same((p.grad for p in model.parameters()), values)
    assert same(buffer, whole)


def test_gradients_that_are_views_of_the_users_own_buffer_stay_views(estimator):
    model, (x, y) = seeded(Classifier), examples()
    buffer = flat_gradients(model)
    optimizer = build(model, estimator)
    assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
    buffer.zero_()  # how such loops clear their gradients
    F.cross_entropy(model(x), y).backward()
    assert same(buffer, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_gradients_of_other_optimizers_and_of_inputs_are_not_added_to(estimator):
    model, other, (x, y) = seeded(Classifier), seeded(lambda: nn.Linear(6, 6)), examples()
    x.requires_grad_()
    other.weight.grad = torch.ones(6, 6)
    owned = other.weight.grad
    optimizer = build(model, estimator)
    assert optimizer.refresh_curvature(forward(optimizer, lambda z: model(other(z)), x, y))
    assert other.weight.grad is owned
    assert same(owned, torch.ones(6, 6))
    assert other.bias.grad is None
    assert x.grad is None


def test_gradients_of_other_optimizers_inside_activation_checkpoints_are_not_added_to():
    first, inner, last, (x, _) = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5), examples()
    optimizer = SophiaG([*first.parameters(), *last.parameters()])  # `inner` belongs to another optimizer
    assert optimizer.refresh_curvature(lambda: last(checkpoint(inner, first(x), use_reentrant=False)))
    assert inner.weight.grad is None


class Checkpointed(nn.Module):
    """Reentrant: the graph shows nothing of what is inside the checkpoint."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.last(checkpoint(self.inner, self.first(x), use_reentrant=True))


def test_attach_keeps_gradients_of_other_optimizers_inside_reentrant_checkpoints():
    model, (x, y) = Checkpointed(), examples()
    optimizer = SophiaG([*model.first.parameters(), *model.last.parameters()]).attach(model)
    F.cross_entropy(model(x), y).backward()
    owned = model.inner.weight.grad
    values = owned.clone()
    optimizer.step()
    assert model.inner.weight.grad is owned
    assert same(owned, values)


def test_frozen_parameters_get_neither_gradient_nor_curvature(estimator):
    model, (x, y) = seeded(Classifier), examples()
    model.inner.weight.requires_grad_(False)
    optimizer = build(model, estimator)
    assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
    assert all(p.grad is None for p in model.parameters())
    assert [h is None for h in curvature(optimizer)] == [True, False, False, False, False]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True]


# ---- random streams, modes and parameters


class Failing(nn.Module):
    """Draws noise and fails at its n-th call."""

    def __init__(self, model, fails_at):
        super().__init__()
        self.model, self.fails_at, self.calls = model, fails_at, 0

    def forward(self, x):
        out = self.model(x)
        torch.rand(3)
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyError("out of luck")
        return out


def surroundings():
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state()[1].tolist(),  # noqa: NPY002 # it is the global one that must not move
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_streams_modes_and_parameters_are_as_before_also_when_forward_raises(estimator, fails_at, grad, autocast):
    model, (x, y) = Failing(seeded(Classifier), fails_at), examples()
    optimizer = build(model, estimator)
    values = [p.detach().clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    groups = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    torch.manual_seed(3)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = surroundings()
        try:
            refreshed = optimizer.refresh_curvature(forward(optimizer, model, x, y))
        except KeyError:
            assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == groups
            assert not optimizer.state
        else:
            assert refreshed
            assert fails_at == 0 or model.calls < fails_at
        assert surroundings() == before
    assert_same(model.parameters(), values)
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None for p in model.parameters())


def test_noise_inside_the_refresh_does_not_depend_on_the_global_stream(estimator):
    model, (x, y) = seeded(Classifier), examples()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        optimizer = build(model, estimator)
        with torch.no_grad():
            assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
        found.append(curvature(optimizer))
    assert_same(*found)


# ---- graphs


@pytest.mark.parametrize("autocast", [True, False])
def test_refresh_between_forward_and_backward_leaves_the_graph_usable(estimator, autocast):
    def gradients(refresh):
        model, (x, y) = seeded(Classifier), examples()
        optimizer = build(model, estimator)
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
            if refresh:
                assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
            after = F.cross_entropy(model(x), y)  # in the same autocast region, which caches its casts
        (loss + after).backward()
        return [p.grad for p in model.parameters()]

    assert_same(gradients(refresh=True), gradients(refresh=False))


def test_refresh_inside_a_no_grad_evaluation_of_the_same_autocast_region(estimator):
    # Autocast caches its casts of the parameters; those made without gradients must not reach the refresh.
    model, (x, y) = seeded(lambda: Classifier(dropout=0)), examples()
    found = []
    for evaluates in (False, True):
        optimizer = build(model, estimator)
        with torch.autocast("cpu", torch.bfloat16):
            if evaluates:
                with torch.no_grad():
                    model(x)
            assert optimizer.refresh_curvature(forward(optimizer, model, x, y))
        found.append(curvature(optimizer))
    assert_same(*found)


# ---- memory


def tensors():
    """Live tensors, in python's hands or held by a graph that python holds."""
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_trap_8_no_graph_outlives_a_refresh(estimator):
    model, (x, y) = seeded(Classifier), examples()
    optimizer = build(model, estimator, curvature_interval=1)
    run, outputs, counts = forward(optimizer, model, x, y), [], []

    def watched():
        out = run()
        outputs.append(weakref.ref(out))
        # A tensor that only the graph holds: it lives as long as the graph does.
        node = out.grad_fn
        node.metadata["witness"] = witness = torch.ones(1)
        outputs.append(weakref.ref(witness))
        return out

    gc.collect()
    gc.disable()  # reference counts alone must do: a cycle through a graph keeps its memory for long
    try:
        for _ in range(6):
            assert optimizer.refresh_curvature(watched)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(ref() is None for ref in outputs)
            counts.append(tensors())
    finally:
        gc.enable()
    assert len(set(counts[1:])) == 1


@pytest.mark.parametrize(
    "reentrant",
    [False, True],
)
def test_hutchinson_under_activation_checkpoints(reentrant):
    model, (x, y) = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))), examples()
    exact, optimizer = SophiaH(model.parameters()), SophiaH(model.parameters())
    assert exact.refresh_curvature(lambda: F.cross_entropy(model(x), y))
    x.requires_grad_()
    assert optimizer.refresh_curvature(lambda: F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y))
    for h, reference in zip(curvature(optimizer), curvature(exact), strict=True):
        assert float((h - reference).norm()) < 1e-3 * float(reference.norm())


def test_fallback_to_finite_differences_leaves_no_graph():
    class NoSecondDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (1 - x.tanh().square())

    model, (x, y) = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))), examples()
    optimizer, outputs = SophiaH(model.parameters(), curvature_interval=1), []

    def loss():
        out = F.cross_entropy(model[1](NoSecondDerivative.apply(model[0](x))), y)
        outputs.append(weakref.ref(out))
        return out

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert optimizer.refresh_curvature(loss)
            assert all(ref() is None for ref in outputs)
            loss().backward()
            optimizer.step()
    finally:
        gc.enable()
    exact = SophiaH(model.parameters())
    optimizer = SophiaH(model.parameters())
    assert optimizer.refresh_curvature(loss)
    assert exact.refresh_curvature(lambda: F.cross_entropy(model[1](model[0](x).tanh()), y))
    for h, reference in zip(curvature(optimizer), curvature(exact), strict=True):
        assert float((h - reference).norm()) < 1e-3 * float(reference.norm())
