"""Going past the engine, and curvature handed over wrongly, is noticed on every rank and changes nothing."""

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from tests.distributed import engines

BF16_COMPUTE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def build(engine, kind=SophiaG, seed=0, **options):
    model = engines.wrap(engine, engines.build(torch.float32), **options)
    return model, kind(model.parameters(), lr=1e-2, curvature_interval=2, seed=seed)


def own_batch():
    tokens, targets = engines.batch()
    own = engines.own_rows()
    return tokens[own], targets[own]


def loss_of(model):
    tokens, targets = own_batch()
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def message_of(function):
    with pytest.raises(RuntimeError) as caught:
        function()
    return str(caught.value)


def refresh_past_ddp(kind, way, seeds):
    """Messages of refreshes that no engine reduces, one for each seed; DDP's own gradients stay as they were."""
    messages = []
    for seed in range(seeds):
        model, optimizer = build("ddp", kind, seed)
        loss_of(model).backward()
        before = engines.snapshot(model, optimizer)
        called = model.module if way == "module" else model
        tokens, _ = own_batch()

        def forward(called=called, tokens=tokens):
            return loss_of(called) if kind is SophiaH else called(tokens)

        if way == "no_sync":
            with model.no_sync():
                messages.append(message_of(lambda o=optimizer, f=forward: o.refresh_curvature(f)))
        else:
            messages.append(message_of(lambda o=optimizer, f=forward: o.refresh_curvature(f)))
        engines.assert_same(engines.snapshot(model, optimizer), before)
        assert optimizer.curvature_due
    return messages


@pytest.mark.parametrize("way", ["module", "no_sync"])
@pytest.mark.parametrize(("kind", "world"), [(SophiaG, 2), (SophiaG, 4), (SophiaH, 2)])
def test_gradients_that_ddp_has_not_reduced(ranks, kind, world, way):
    for messages in ranks.run(refresh_past_ddp, kind, way, 20, world=world):
        assert len(messages) == 20
        for message in messages:
            assert "call the DDP wrapper" in message
            assert "attach" in message


def refresh_without_sync(options):
    """The gradient of a batch after a refresh that FSDP2 was told not to reduce, and without any."""
    gradients = []
    for misused in (True, False):
        model, optimizer = build("fsdp", **options)
        if misused:
            tokens, _ = own_batch()
            model.set_requires_gradient_sync(False)
            message = message_of(lambda o=optimizer, m=model, t=tokens: o.refresh_curvature(lambda: m(t)))
            model.set_requires_gradient_sync(True)
            assert not optimizer.state
        loss_of(model).backward()
        gradients.append(engines.snapshot(model))
    return message, gradients


@pytest.mark.parametrize("options", [{}, {"mp_policy": BF16_COMPUTE}], ids=["fp32", "bf16"])
def test_gradients_that_fsdp2_has_not_reduced(ranks, options):
    for message, (after, clean) in ranks.run(refresh_without_sync, options):
        assert "set_requires_gradient_sync" in message
        engines.assert_same(after, clean)


def update_with(engine, what):
    """update_curvature with a fault on rank 1: what it returns or raises; nothing has changed."""
    model, optimizer = build(engine)
    params = list(model.parameters())
    estimates = [torch.ones_like(p) for p in params]
    if engines.place()[0] == 1:
        if what == "shape":
            estimates[0] = torch.ones(3)
        elif what == "count":
            estimates = estimates[1:]
        else:
            part = estimates[0].to_local() if isinstance(estimates[0], DTensor) else estimates[0]
            part.view(-1)[1] = float(what)
    before = engines.snapshot(model, optimizer)
    try:
        outcome = optimizer.update_curvature(estimates)
    except Exception as problem:
        outcome = f"{type(problem).__name__}: {problem}"
    engines.assert_same(engines.snapshot(model, optimizer), before)
    assert optimizer.curvature_due
    return outcome, optimizer.stats()["refused_refreshes"].item()


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_handed_curvature_that_is_not_finite_on_one_rank(ranks, engine, number):
    assert ranks.run(update_with, engine, number) == [(False, 1), (False, 1)]


@pytest.mark.parametrize("what", ["shape", "count"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_handed_curvature_that_does_not_fit_on_one_rank(ranks, engine, what):
    (first, _), (second, _) = ranks.run(update_with, engine, what)
    assert first.startswith("RuntimeError")
    assert "failed on rank [1]" in first
    assert second.startswith("ValueError: ")


def update_with_plain_tensors():
    model, optimizer = build("fsdp")
    with pytest.raises(ValueError, match="distribute_tensor"):
        optimizer.update_curvature([torch.ones(p.shape) for p in model.parameters()])
    estimates = [distribute_tensor(torch.ones(p.shape), p.device_mesh, p.placements) for p in model.parameters()]
    assert optimizer.update_curvature(estimates)
    return engines.snapshot(model, optimizer)


def test_handed_curvature_is_sharded_as_its_parameter(ranks):
    for snapshot in ranks.run(update_with_plain_tensors):
        for name, value in snapshot.items():
            if name.endswith("hessian"):
                torch.testing.assert_close(value, torch.full_like(value, 0.01))


def step_without_refresh(engine):
    model, optimizer = build(engine)
    loss_of(model).backward()
    before = engines.snapshot(model, optimizer)
    message = message_of(optimizer.step)
    engines.assert_same(engines.snapshot(model, optimizer), before)
    return message


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_step_before_any_refresh(ranks, engine):
    for message in ranks.run(step_without_refresh, engine):
        assert "refresh_curvature" in message


def step_attached(engine, fault):
    """An attached loop whose refresh fails on rank 1: what step() says; parameters and gradients are as they were."""
    model, optimizer = build(engine)
    faulty = engines.place()[0] == 1

    def mask(tokens):
        if faulty and fault == "mask":
            raise LookupError("lost on rank 1")
        return torch.ones_like(tokens, dtype=torch.bool)

    optimizer.attach(model, mask=mask)
    model.train(not (faulty and fault == "evaluation"))
    loss_of(model).backward()
    before = engines.snapshot(model, optimizer)
    with pytest.raises((RuntimeError, LookupError)) as caught:
        optimizer.step()
    engines.assert_same(engines.snapshot(model, optimizer), before)
    return str(caught.value)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_an_attached_refresh_that_fails_on_one_rank(ranks, engine):
    first, second = ranks.run(step_attached, engine, "mask")
    assert "failed on rank [1]" in first
    assert "lost on rank 1" in second


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_one_rank_that_saw_no_training_forward(ranks, engine):
    for message in ranks.run(step_attached, engine, "evaluation"):
        assert "no training forward" in message
