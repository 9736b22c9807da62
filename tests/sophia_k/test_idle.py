"""A setting that changes nothing beside the others is refused, if somebody asked for it."""

import pytest
import torch
from torch import nn

from sophia import SophiaK
from sophia.curvature import GaussNewtonBartlett
from tests.models import Snapshot
from tests.sophia_k import nets

GRADIENTS = {"factors": "gradients", "diagonal": "gradients"}


def parameter(shape=(3, 4)):
    return nn.Parameter(torch.zeros(shape))


# (what makes it idle, the setting, what the message says)
OF_A_GROUP = [
    ({"basis": "none"}, {"factors": "gradients"}, "factors='gradients' has no effect: basis='none' turns nothing"),
    ({"basis": "none"}, {"max_basis_dim": 100}, "max_basis_dim=100 has no effect: basis='none'"),
    ({"basis": "none"}, {"rtol": 0.0}, r"rtol=0\.0 has no effect: basis='none'"),
    (
        {"basis": "none", "orthogonalize": 0},
        {"product_dtype": torch.bfloat16},
        "product_dtype=.*bfloat16.* has no effect: basis='none' and orthogonalize=0 need no products",
    ),
    (
        {"others": "curvature"},
        {"nu": 0.9},
        "nu=0.9 has no effect: others='curvature', and it is a setting of Adam's rule",
    ),
    ({"exponent": 0.0}, {"rtol": 0.1}, r"rtol=0\.1 has no effect: exponent=0 divides by no curvature"),
    *(
        ({"hidden": False}, {name: value}, f"{name}=.* has no effect: hidden=False")
        for name, value in {
            **{"basis": "both", **GRADIENTS, "exponent": 1.0, "clip": False, "orthogonalize": 0, "nesterov": False},
            **{"max_basis_dim": 100, "rtol": 0.1, "product_dtype": torch.bfloat16},
            **{"gamma": 0.5, "eps": 1e-8, "update_rms": None},
        }.items()
    ),
]
ONLY_THE_CONSTRUCTOR = [
    ({"basis": "none", "diagonal": "gradients"}, {"curvature_interval": 5}, "neither curvature nor a basis is made"),
    ({"hidden": False}, {"curvature_interval": 5}, "neither curvature nor a basis is made"),
    (GRADIENTS, {"estimator": GaussNewtonBartlett(noise="labels")}, "factors, diagonal and others are made of gradie"),
    ({"basis": "none", "diagonal": "gradients"}, {"estimator": GaussNewtonBartlett()}, "leave it out"),
]


@pytest.mark.parametrize(("others", "setting", "message"), OF_A_GROUP + ONLY_THE_CONSTRUCTOR, ids=str)
def test_arguments(others, setting, message):
    with pytest.raises(ValueError, match=message):
        SophiaK([parameter()], **others, **setting)
    SophiaK([parameter()], **others)
    SophiaK([parameter()], **setting)  # alone it means something
    with pytest.raises(ValueError, match=message):  # and in any group that leaves it no use
        SophiaK([{"params": [parameter()], **others}, {"params": [parameter()], **others}], **setting)


@pytest.mark.parametrize(("others", "setting", "message"), OF_A_GROUP, ids=str)
def test_groups(others, setting, message):
    group = {"params": [parameter()], **others, **setting}
    with pytest.raises(ValueError, match=message):
        SophiaK([group])
    model = nets.build()
    optimizer = SophiaK(nets.groups(model))
    nets.train(model, optimizer, 1)
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    before.assert_unchanged()


@pytest.mark.parametrize(("others", "setting", "message"), OF_A_GROUP, ids=str)
def test_one_group_that_uses_an_argument_is_enough(others, setting, message):
    """The others take it as what holds where nothing is said, and may even repeat it."""
    groups = [{"params": [parameter()], **others}, {"params": [parameter()]}]
    optimizer = SophiaK(groups, **setting)
    optimizer.add_param_group({"params": [parameter()], **others, **setting})


@pytest.mark.parametrize("others", [case[0] for case in OF_A_GROUP + ONLY_THE_CONSTRUCTOR], ids=str)
def test_defaults_are_never_refused(others):
    standard = {**SophiaK([parameter()]).defaults, "curvature_interval": 10, "estimator": None, "seed": 3}
    for name in ("foreach", "fused", "capturable", "clip_target", "bias_correction"):
        del standard[name]
    SophiaK([parameter()], **{**standard, **others})


def test_a_state_dict_is_loaded_whatever_it_holds():
    """It may be of a run that was made before a setting lost its use."""
    optimizer = SophiaK([parameter()])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"basis": "none", "factors": "gradients"}
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["factors"] == "gradients"
