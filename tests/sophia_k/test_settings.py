"""A wrong setting, group, state dict or estimate is an error that names the value and the remedy."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from sophia import SophiaG, SophiaK
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from tests.models import Snapshot
from tests.sophia_k import nets

NAN, INF = float("nan"), float("inf")


def parameter(shape=(3, 4)):
    return nn.Parameter(torch.zeros(shape))


OF_A_GROUP = [
    ({"fused": 1}, "fused=1 must be True, False or None"),
    ({"basis": "left"}, "basis='left' must be one of 'both', 'smaller', 'none'"),
    ({"basis": None}, "basis=None must be one of"),
    ({"basis": ["both"]}, r"basis=\['both'\] must be one of"),
    ({"factors": "gradient"}, "factors='gradient' must be one of 'curvature', 'gradients'"),
    ({"diagonal": 1}, "diagonal=1 must be one of 'curvature', 'gradients'"),
    ({"others": "adam"}, "others='adam' must be one of 'curvature', 'gradients'"),
    ({"hidden": 1}, "hidden=1 must be True or False"),
    ({"clip": None}, "clip=None must be True or False"),
    ({"nesterov": "yes"}, "nesterov='yes' must be True or False"),
    ({"maximize": 1}, "maximize=1 must be True or False"),
    ({"orthogonalize": -1}, "orthogonalize=-1 must be a whole number of at least 0"),
    ({"orthogonalize": True}, "orthogonalize=True must be a whole number"),
    ({"orthogonalize": 2.5}, r"orthogonalize=2\.5 must be a whole number"),
    ({"max_basis_dim": 0}, "max_basis_dim=0 must be a whole number of at least 1"),
    ({"max_basis_dim": 1e3}, r"max_basis_dim=1000\.0 must be a whole number"),
    ({"exponent": -0.5}, r"exponent=-0\.5 must be a finite number of at least 0, "),
    ({"exponent": INF}, "exponent=inf must be"),
    ({"exponent": NAN}, "exponent=nan must be"),
    ({"exponent": "1"}, "exponent='1' must be"),
    ({"exponent": None}, "exponent=None must be a finite number"),
    ({"nu": -0.1}, r"nu=-0\.1 must be a number between 0 and 1"),
    ({"nu": 1.1}, r"nu=1\.1 must be"),
    ({"nu": NAN}, "nu=nan must be"),
    ({"nu": "1"}, "nu='1' must be"),
    ({"nu": True}, "nu=True must be"),
    ({"update_rms": 0.0}, r"update_rms=0\.0 must be a finite number above 0 or None"),
    ({"update_rms": INF}, "update_rms=inf must be"),
    ({"update_rms": True}, "update_rms=True must be"),
    ({"gamma": "auto"}, r"gamma='auto' \(a clip_target\) follows coordinates in one basis; SophiaK has"),
    ({"gamma": -0.1}, r"gamma=-0\.1 must be a finite number of at least 0"),
    ({"eps": 0.0}, r"eps=0\.0 must be positive"),
    ({"lr": -1.0}, r"lr=-1\.0 must be"),
    ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\): beta2 must be"),
    ({"weight_decay": NAN}, "weight_decay=nan must be"),
]
ONLY_THE_CONSTRUCTOR = [
    ({"curvature_interval": 0}, "curvature_interval=0 must be a whole number of steps"),
    ({"estimator": Hutchinson()}, r"estimator=Hutchinson\(.*needs sophia\.curvature\.GaussNewtonBartlett\(\), or None"),
    ({"estimator": GaussNewtonBartlett}, r"estimator=<class .*GaussNewtonBartlett\(\), or None"),
    ({"estimator": "signs"}, "estimator='signs' gives no sampled gradients"),
    ({"seed": -1}, "seed=-1 must be"),
    ({"state_dtype": torch.int8}, r"state_dtype=torch\.int8 must be"),
    ({"gradient_reduction": "avg"}, "gradient_reduction='avg' must say"),
    ({"ortogonalize": 5}, "SophiaK has no setting 'ortogonalize': did you mean 'orthogonalize'"),
    ({"foreach": True}, "SophiaK has no setting 'foreach': there is one path only"),
    ({"bias_correction": False}, "SophiaK has no setting 'bias_correction'"),
    ({"rho": 0.04}, "SophiaK has no setting 'rho': .* gamma here"),
    ({"k": 10}, "'k': it is called curvature_interval here"),
]
ONLY_A_GROUP = [
    ({"foreach": True}, "foreach=True: SophiaK has no such path, as products of matrices have none; leave it out"),
    ({"clip_target": 0.5}, r"clip_target=0\.5 has a meaning with gamma='auto' only"),
    ({"orthogonalise": 3}, "a param group has no setting 'orthogonalise': did you mean 'orthogonalize'"),
    ({"hiden": False}, "a param group has no setting 'hiden': did you mean 'hidden'"),
    ({"curvature_interval": 5}, "'curvature_interval' in a param group: there is one for all groups"),
    ({"bias_correction": False}, "bias_correction=False"),
]


def named(cases):
    return [str(getattr(case, "values", case)[0]) for case in cases]


@pytest.mark.parametrize(
    ("settings", "message"), OF_A_GROUP + ONLY_THE_CONSTRUCTOR, ids=named(OF_A_GROUP + ONLY_THE_CONSTRUCTOR)
)
def test_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        SophiaK([parameter()], **settings)


@pytest.mark.parametrize(("settings", "message"), OF_A_GROUP + ONLY_A_GROUP, ids=named(OF_A_GROUP + ONLY_A_GROUP))
def test_param_group(settings, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        SophiaK([{"params": [parameter()], **settings}])
    model = nets.build()
    optimizer = SophiaK(nets.groups(model))
    nets.train(model, optimizer, 1)
    before = Snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.add_param_group({"params": [parameter()], **settings})
    before.assert_unchanged()


def test_a_refused_group_is_forgotten():
    optimizer, new = SophiaK([parameter()]), parameter()
    known = weakref.ref(new)
    with pytest.raises(ValueError, match="basis"):
        optimizer.add_param_group({"params": [new], "basis": "left"})
    del new
    gc.collect()
    assert known() is None


# ---- estimates


@pytest.mark.parametrize(
    ("estimates", "message"),
    [
        (torch.ones(3), "estimates is a Tensor: give a list, one tensor or None a parameter"),
        ([torch.ones(2, 3, 4)], "got 1 estimates for 2 parameters"),
        (
            [torch.ones(3, 4), None],
            r"estimate 0 has shape \(3, 4\), its parameter is a hidden matrix of shape \(3, 4\): give its sampled "
            r"gradients over the root of the number of predictions, \[chunks, rows, columns\]",
        ),
        ([torch.ones(0, 3, 4), None], r"estimate 0 has shape \(0, 3, 4\), its parameter is a hidden matrix"),
        ([torch.ones(2, 4, 3), None], r"estimate 0 has shape \(4, 3\), its parameter \(3, 4\): they must match"),
        ([None, torch.ones(4)], r"estimate 1 has shape \(4,\), its parameter \(3,\)"),
        ([torch.ones(2, 3, 4, dtype=torch.int64), None], r"estimate 0 is torch\.int64: it must be floating point"),
        (["x", None], "estimate 0 is a str, not a tensor or None"),
        ([None, torch.tensor([1.0, -1e-9, 0.0])], "estimate 1 has negative entries, which SophiaK has no meaning for"),
        ([None, torch.ones(3).to_sparse()], "estimate 1 has layout torch.sparse_coo: give a dense tensor, or None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_estimates(estimates, message):
    optimizer = SophiaK([parameter(), parameter((3,))])
    with pytest.raises(ValueError, match=message):
        optimizer.update_curvature(estimates)
    assert not optimizer.state
    assert optimizer.refreshes == 0


def test_no_estimate_at_all_is_a_refresh_that_reaches_nobody():
    optimizer = SophiaK([p := parameter()])
    assert optimizer.update_curvature([None])
    p.grad = torch.ones(3, 4)
    with pytest.warns(UserWarning, match="1 parameters have gradients, but the curvature refresh did not reach them"):
        optimizer.step()
    assert not p.any()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SophiaK(embedding.parameters(), hidden=False)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()


# ---- state dicts


def trained(**settings):
    model = nets.build()
    optimizer = SophiaK(nets.groups(model), **settings)
    nets.train(model, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize("wrong", [{"basis": "left"}, {"orthogonalize": -1}, {"clip_target": 0.7}], ids=str)
def test_a_state_dict_with_a_setting_that_the_constructor_refuses(wrong):
    """As for Sophia's own: `SophiaG` does not load lr=-1."""
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SophiaK(nets.groups(model)).load_state_dict(saved)


@pytest.mark.parametrize("name", ["row_basis", "column_statistics", "exp_avg_sq"])
def test_a_state_dict_with_state_of_another_shape(name):
    model, optimizer = trained(basis="both", diagonal="gradients")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = torch.eye(2)
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 in the state dict has shape \(2, 2\)"):
        SophiaK(nets.groups(model)).load_state_dict(saved)


@pytest.mark.parametrize("nu", [1.0, 0.3])
def test_adams_rule_begins_anew_where_squares_are_missing(nu):
    """After SophiaG: the first square is corrected as the first, or coordinates move by many learning rates."""
    model = nets.build()
    old = SophiaG(model.parameters(), lr=1e-3, weight_decay=0.0)
    nets.train(model, old, 9)
    optimizer = SophiaK(model.parameters(), nu=nu)
    optimizer.load_state_dict(old.state_dict())
    p = model.head.bias
    own, before = optimizer.state[p], p.detach().clone()
    assert "exp_avg_sq" not in own
    nets.train(model, optimizer, 1, start=9)
    expected = 1e-3 * (nu * own["exp_avg"] / (1 - 0.96**10) + (1 - nu) * p.grad) / p.grad.abs()
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-4, atol=0)


def test_a_left_over_hessian_does_not_keep_squares_from_turning_along():
    """A diagonal of curvature from SophiaG's state dict, where SophiaK makes its own of gradients."""
    runs = []
    for left_over in (False, True):
        model, optimizer = trained(diagonal="gradients", basis="both", curvature_interval=2)
        saved = copy.deepcopy(optimizer.state_dict())
        if left_over:
            for own in saved["state"].values():
                own["hessian"] = torch.ones_like(own["exp_avg"])
        optimizer.load_state_dict(saved)
        nets.train(model, optimizer, 4, start=2)
        runs.append(model.first.weight.detach())
    torch.testing.assert_close(*runs)


def test_sophia_g_does_not_take_a_diagonal_in_another_basis_for_its_own():
    model, optimizer = trained(basis="both", others="curvature")
    other = SophiaG(model.parameters())
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="basis"):
        other.load_state_dict(
            {**saved, "param_groups": [{**saved["param_groups"][0], "params": list(range(len(saved["state"])))}]}
        )
