"""Settings, groups, estimators, checkpoints, attach(): a wrong one is an error that names the value and the remedy."""

import copy

import pytest
import torch
from torch import nn

from sophia import Sophia, SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from tests.models import Snapshot, in_the_middle, seeded

NAN, INF = float("nan"), float("inf")


def parameters():
    return seeded(lambda: nn.Linear(6, 5)).parameters()


# ---- constructors

ARGUMENTS = [
    ({"lr": -1e-3}, r"lr=-0\.001 must be a finite number of at least 0"),
    ({"lr": NAN}, "lr=nan must be"),
    ({"lr": INF}, "lr=inf must be"),
    ({"lr": "1e-3"}, "lr='1e-3' must be a finite number"),
    ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\): it must hold one number"),
    ({"lr": torch.tensor(-1.0)}, r"lr=-1\.0 must be"),
    ({"betas": (1.0, 0.99)}, r"betas=\(1\.0, 0\.99\): beta1 must be at least 0 and less than 1"),
    ({"betas": (0.9, -0.1)}, r"betas=\(0\.9, -0\.1\): beta2 must be"),
    ({"betas": (0.9, NAN)}, r"betas=\(0\.9, nan\): beta2 must be"),
    ({"betas": (0.9,)}, r"betas=\(0\.9,\) must be a pair \(beta1, beta2\)"),
    ({"betas": 0.9}, r"betas=0\.9 must be a pair"),
    ({"betas": ("0.9", "0.99")}, r"betas=\('0\.9', '0\.99'\): beta1 must be"),
    ({"gamma": -0.05}, r"gamma=-0\.05 must be a finite number of at least 0"),
    ({"gamma": None}, "gamma=None must be"),
    ({"eps": 0.0}, r"eps=0\.0 must be positive"),
    ({"eps": -1e-12}, "eps=-1e-12 must be positive"),
    ({"eps": 1e-45}, r"eps=1e-45 must be positive, at least 1\.18e-38"),
    ({"eps": NAN}, "eps=nan must be positive"),
    ({"weight_decay": -0.1}, r"weight_decay=-0\.1 must be"),
    ({"weight_decay": True}, "weight_decay=True must be a finite number"),
    ({"curvature_interval": 0}, "curvature_interval=0 must be a whole number of steps, at least 1"),
    ({"curvature_interval": 2.5}, r"curvature_interval=2\.5 must be a whole number"),
    ({"curvature_interval": True}, "curvature_interval=True must be a whole number"),
    ({"seed": -1}, "seed=-1 must be a whole number"),
    ({"seed": 0.5}, r"seed=0\.5 must be a whole number"),
    ({"gradient_reduction": "avg"}, "gradient_reduction='avg' must say .*'mean', 'sum', 'none'"),
    ({"state_dtype": torch.int32}, r"state_dtype=torch\.int32 must be a floating point torch\.dtype, or None"),
    ({"state_dtype": "fp32"}, "state_dtype='fp32' must be"),
    ({"estimator": "gnb"}, "estimator='gnb' has no estimate.* method: give an instance"),
    ({"estimator": GaussNewtonBartlett}, r"a class: give an instance, GaussNewtonBartlett\(\)"),
    ({"fused": True, "foreach": True}, "foreach=True and fused=True ask for two paths at once"),
    ({"capturable": True}, "capturable=True needs .*leave it False"),
    # What other implementations call it, and slips of the pen.
    ({"rho": 0.04}, "'rho': the official code's rho is gamma here"),
    ({"bs": 480}, "'bs': the batch factor is part of the curvature estimate"),
    ({"gama": 0.05}, "'gama': did you mean 'gamma'"),
    ({"k": 10}, "'k': it is called curvature_interval here"),
    ({"update_period": 10}, "it is called curvature_interval here"),
    ({"wd": 0.1}, "'wd': it is called weight_decay here"),
    ({"zzz": 1}, "has no setting 'zzz': it takes params, lr, betas"),
]


@pytest.mark.parametrize("kind", [Sophia, SophiaG, SophiaH])
@pytest.mark.parametrize(("settings", "message"), ARGUMENTS, ids=[str(settings) for settings, _ in ARGUMENTS])
def test_argument(kind, settings, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        kind(parameters(), **settings)


def test_empty_parameter_list():
    with pytest.raises(ValueError, match=r"parameters is empty: pass model\.parameters\(\)"):
        SophiaG([])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: GaussNewtonBartlett(likelihood="poisson"),
            "likelihood='poisson' is not one of categorical, bernoulli",
        ),
        (lambda: GaussNewtonBartlett(noise="label"), "noise='label' is not one of labels, signs"),
        (lambda: GaussNewtonBartlett(chunks=0), "chunks=0 must be a whole number of at least 1"),
        (lambda: GaussNewtonBartlett(chunks=1.5), r"chunks=1\.5 must be"),
        (lambda: GaussNewtonBartlett(vocab_size=1), "vocab_size=1 must be a whole number of at least 2"),
        (
            lambda: GaussNewtonBartlett(vocab_size=9, likelihood="bernoulli"),
            "vocab_size=9 has no meaning for the berno",
        ),
        (lambda: Hutchinson(noise="uniform"), "noise='uniform' is not one of gaussian, rademacher"),
        (lambda: Hutchinson(product="exact"), "product='exact' is not one of auto, double_backward, finite_diff"),
    ],
)
def test_estimator(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- param groups


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0 must be"),
        ({"betas": (0.9, 1.0)}, "beta2 must be"),
        ({"eps": 0}, "eps=0 must be positive"),
        ({"curvature_interval": 5}, "'curvature_interval' in a param group: there is one .*pass it to the constructor"),
        ({"seed": 5}, "'seed' in a param group: there is one for all groups"),
        ({"clock": 5}, "'clock' in a param group: the optimizer keeps its own there; use another name"),
        ({"rho": 0.05}, "a param group has no setting 'rho': the official code's rho is gamma here"),
        ({"weight_decy": 0.1}, "a param group has no setting 'weight_decy': did you mean 'weight_decay'"),
        ({"fused": True, "foreach": True}, "foreach=True and fused=True ask for two paths at once"),
    ],
)
def test_param_group(settings, message):
    new = nn.Parameter(torch.ones(3))
    with pytest.raises((ValueError, RuntimeError), match=message):
        SophiaG([{"params": [new], **settings}])
    _, optimizer = in_the_middle()
    before = Snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.add_param_group({"params": [new], **settings})
    before.assert_unchanged()
    optimizer.add_param_group({"params": [new]})


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(3, dtype=torch.complex64), r"of shape \(3,\) is torch\.complex64: .*torch\.view_as_complex"),
        (torch.ones(3, dtype=torch.int64), r"of shape \(3,\) is torch\.int64, which has no gradient"),
    ],
)
def test_parameter_that_the_rule_has_no_meaning_for(parameter, message):
    with pytest.raises(ValueError, match=message):
        SophiaG([nn.Parameter(parameter, requires_grad=parameter.is_complex())])


# ---- checkpoints and attach


def fewer_parameters(state):
    state["param_groups"][0]["params"].pop()


def more_groups(state):
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))


def other_shape(state):
    state["state"][0]["hessian"] = torch.ones(3, 3)


def other_settings(state):
    state["param_groups"][0]["betas"] = (2.0, 3.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fewer_parameters, "doesn't match the size"),
        (more_groups, "different number of parameter groups"),
        (other_shape, r"\(3, 3\)"),
        (other_settings, r"betas=\(2\.0, 3\.0\)"),
    ],
)
def test_load_state_dict(spoil, message):
    _, optimizer = in_the_middle()
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "a model that has none of the optimizer's parameters: give the model that the"),
        ({"model": "model"}, r"needs the model, an nn\.Module, and got str"),
        ({"max_batch": 0}, "max_batch=0 must be a whole number of rows, at least 1"),
        ({"max_batch": 2.0}, r"max_batch=2\.0 must be"),
        ({"logits": "logits"}, r"attach\(logits=\.\.\.\) must be a function, and is a str"),
        ({"mask": torch.ones(3)}, r"attach\(mask=\.\.\.\) must be a function, and is a Tensor"),
    ],
)
def test_attach(arguments, message):
    model, optimizer = in_the_middle()
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.attach(**{"model": model, **arguments})
    before.assert_unchanged()
    assert not model._forward_pre_hooks
    optimizer.attach(model)


def test_mask_for_an_estimator_that_takes_the_loss():
    model, optimizer = in_the_middle(SophiaH)
    with pytest.raises(ValueError, match=r"attach\(mask=\.\.\.\) has no meaning for Hutchinson"):
        optimizer.attach(model, mask=lambda x: x[:, 0] > 0)


def test_rule_without_an_estimator():
    optimizer = Sophia(parameters())
    for use in (lambda: optimizer.refresh_curvature(lambda: None), lambda: optimizer.attach(nn.Linear(2, 2))):
        with pytest.raises(RuntimeError, match=r"has no estimator: build it with estimator=.*update_curvature\(\)"):
            use()
