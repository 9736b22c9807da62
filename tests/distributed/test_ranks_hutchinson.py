"""Hutchinson's estimate by finite differences under DDP and FSDP2: one u for all replicas, parameters as before."""

import contextlib

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F

from sophia import SophiaH
from sophia.curvature import Hutchinson
from tests.distributed import engines

ENGINES = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


def mean_loss(model, step=0, rows=None):
    tokens, targets = engines.batch(step)
    rows = engines.own_rows() if rows is None else rows
    return F.cross_entropy(model(tokens[rows]).flatten(0, 1).float(), targets[rows].flatten())


def build(engine, dtype=torch.float32, product="auto", noise="gaussian", **settings):
    model = engines.wrap(engine, engines.build(dtype, **settings))
    optimizer = SophiaH(model.parameters(), betas=(0.9, 0.0), estimator=Hutchinson(product=product, noise=noise))
    return model, optimizer  # β2 = 0: the state is the estimate


def curvature(model, optimizer):
    return {k: v for k, v in engines.snapshot(model, optimizer).items() if k.endswith("hessian")}


def estimate(engine, noise, product="auto", evaluating=False):
    model, optimizer = build(engine, product=product, noise=noise)
    if evaluating:
        with torch.no_grad():
            mean_loss(model)
    mean_loss(model).backward()
    if evaluating:
        with torch.no_grad():
            mean_loss(model)
    before = engines.snapshot(model)
    assert optimizer.refresh_curvature([lambda: mean_loss(model, 0), lambda: mean_loss(model, 1)])
    engines.assert_same(engines.snapshot(model), before)  # parameters and gradients, bit for bit
    return curvature(model, optimizer)


def assert_near(found, exact):
    """To one percent: of each tensor's norm. With a u for each of two replicas the error would be a half or more."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert (found[name] - value).norm() < 0.01 * value.norm(), name


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize(("engine", "world"), ENGINES)
def test_near_the_exact_product_of_a_single_process(ranks, engine, world, noise):
    exact = estimate("none", noise, "double_backward")
    for found in ranks.run(estimate, engine, noise, world=world):
        assert_near(found, exact)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_after_an_evaluation(ranks, engine):
    """FSDP2's outermost module keeps its gathered parameters after a forward without backward."""
    exact = estimate("none", "gaussian", "double_backward")
    for found in ranks.run(estimate, engine, "gaussian", "finite_difference", True):
        assert_near(found, exact)


def estimate_of_shared_data(engine):
    model, optimizer = build(engine)
    assert optimizer.refresh_curvature(lambda: mean_loss(model, rows=[0, 1]))
    return curvature(model, optimizer)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_replicas_with_equal_data_are_one(ranks, engine):
    exact = estimate_of_shared_data("none")
    for found in ranks.run(estimate_of_shared_data, engine):
        assert_near(found, exact)


def refuse(engine, product, dtype, remedy):
    model, optimizer = build(engine, dtype, product)
    before = engines.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=remedy):
        optimizer.refresh_curvature(lambda: mean_loss(model))
    engines.assert_same(engines.snapshot(model, optimizer), before)
    assert optimizer.curvature_due


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_double_backward_is_refused_with_the_remedy(ranks, engine):
    ranks.run(refuse, engine, "double_backward", torch.float32, 'double_backward.* use "finite_difference" or "auto"')


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_low_precision_parameters_are_refused_with_the_remedy(ranks, engine):
    ranks.run(refuse, engine, "auto", torch.bfloat16, "bfloat16.* SophiaG")


def estimate_under_autocast(engine, enabled):
    model, optimizer = build(engine)
    with torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext():
        assert optimizer.refresh_curvature(lambda: mean_loss(model))
    return curvature(model, optimizer)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_autocast_is_off(ranks, engine):
    plain = ranks.run(estimate_under_autocast, engine, False)[0]
    for found in ranks.run(estimate_under_autocast, engine, True):
        engines.assert_same(found, plain)


def estimate_with_frozen_and_unused(engine):
    options = {"find_unused_parameters": True} if engine == "ddp" else {}
    net = engines.build(torch.float32, spare=True)
    net.bias.requires_grad_(False)
    model = engines.wrap(engine, net, **options)
    optimizer = SophiaH(model.parameters(), betas=(0.9, 0.0))
    assert optimizer.refresh_curvature(lambda: mean_loss(lambda tokens: model(tokens, False)))
    return curvature(model, optimizer)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_frozen_and_unused_parameters_get_no_curvature(ranks, engine):
    exact = estimate_with_frozen_and_unused("none")
    assert not {"bias.hessian", "spare.hessian"} & exact.keys()
    for found in ranks.run(estimate_with_frozen_and_unused, engine):
        assert_near(found, exact)


def refuse_low_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = engines.wrap("fsdp", engines.build(torch.float32), mp_policy=policy)
    optimizer = SophiaH(model.parameters())
    with pytest.raises(ValueError, match=r"gathers the parameters in torch\.bfloat16: leave param_dtype out"):
        optimizer.refresh_curvature(lambda: mean_loss(model))
    return optimizer.curvature_due


def test_parameters_gathered_in_bf16_are_refused(ranks):
    """Their differences would be rounding: a third of the estimate was, in the trainer's smallest model."""
    assert ranks.run(refuse_low_precision) == [True, True]


def fail_between_the_differences(engine):
    """The second forward fails on one rank: parameters, gradients and the model's loss, before and after."""
    model, optimizer = build(engine)
    loss = mean_loss(model)
    loss.backward()
    before = engines.snapshot(model)
    calls = []

    def forward():
        calls.append(None)
        loss = mean_loss(model)
        if len(calls) == 2 and engines.place()[0] == 1:
            raise LookupError("a forward that fails now and then")
        return loss

    with pytest.raises((LookupError, RuntimeError)):
        optimizer.refresh_curvature(forward)
    return (before, loss.detach()), (engines.snapshot(model), mean_loss(model).detach())


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_failure_half_way_restores_the_parameters(ranks, engine):
    for (before, loss_before), (after, loss_after) in ranks.run(fail_between_the_differences, engine):
        engines.assert_same(after, before)
        assert torch.equal(loss_after, loss_before)
