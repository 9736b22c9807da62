"""State: saved, loaded, copied and pickled in the middle of a run, which goes on bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sophia import SophiaG, SophiaK
from tests.models import assert_same
from tests.sophia_k import nets

SETTINGS = {"lr": 0.02, "curvature_interval": 3, "seed": 2}
RULES = [
    {},
    {"basis": "both", "others": "curvature"},
    {"basis": "both", "factors": "gradients", "diagonal": "gradients", "exponent": 1.0, "gamma": 1.0, "nu": 0.2},
    {"diagonal": "gradients", "exponent": 0.0, "nu": 1.0},
    {"factors": "gradients", "basis": "both"},
    {"basis": "none", "orthogonalize": 0, "clip": False, "exponent": 0.75, "update_rms": 0.2, "nesterov": False},
    {"state_dtype": torch.bfloat16, "others": "curvature", "maximize": True},
]
BEFORE, AFTER = 5, 6  # steps; the state is taken between two refreshes


def begin(dtype=torch.float32, seed=0, **settings):
    model = nets.build(dtype, seed=seed)
    return model, SophiaK(nets.groups(model), **{**SETTINGS, **settings})


def everything(model, optimizer):
    """Parameters, state and settings."""
    found = [p.detach() for p in model.parameters()]
    for p in nets.parameters(optimizer):
        found += [value for _, value in sorted(optimizer.state[p].items())]
    for group in optimizer.param_groups:
        # Copies have torch's own "differentiable" in addition.
        found += [value for name, value in sorted(group.items()) if name not in ("params", "differentiable")]
    return found


def go_on(model, optimizer):
    nets.train(model, optimizer, AFTER, start=BEFORE)
    return everything(model, optimizer)


def reloaded(model, optimizer, **settings):
    """Another model and optimizer, of other values and settings, with what was saved."""
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = nets.build(model.head.weight.dtype, seed=5)
    again.load_state_dict(saved["model"])
    resumed = SophiaK(nets.groups(again), **settings)
    resumed.load_state_dict(saved["optimizer"])
    return again, resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_a_state_dict_goes_on_bit_for_bit(settings, dtype):
    """All settings of the rule are in it."""
    model, optimizer = begin(dtype, **settings)
    nets.train(model, optimizer, BEFORE)
    again, resumed = reloaded(model, optimizer, state_dtype=settings.get("state_dtype"))
    assert_same(everything(again, resumed), everything(model, optimizer))
    assert_same(go_on(again, resumed), go_on(model, optimizer))


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_bit_for_bit(twin_of, settings):
    model, optimizer = begin(**settings)
    nets.train(model, optimizer, BEFORE)
    twin, other = twin_of((model, optimizer))
    for one, two in zip(nets.parameters(optimizer), nets.parameters(other), strict=True):
        assert one is not two
        assert all(
            value.data_ptr() != other.state[two][name].data_ptr() for name, value in optimizer.state[one].items()
        )
    expected = go_on(model, optimizer)
    assert_same(go_on(twin, other), expected)
    # A group that is added to a copy takes the constructor's settings.
    other.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    for name, value in settings.items():
        if name != "state_dtype":
            assert other.param_groups[-1][name] == value


def test_loading_copies_state():
    """What is saved does not change as the run goes on, nor the run with what was loaded."""
    model, optimizer = begin(basis="both")
    nets.train(model, optimizer, BEFORE)
    loaded = optimizer.state_dict()
    before = copy.deepcopy(loaded)
    twin = copy.deepcopy(model)
    other = SophiaK(nets.groups(twin))
    other.load_state_dict(loaded)
    nets.train(twin, other, AFTER, start=BEFORE)
    for index, own in before["state"].items():
        assert_same(loaded["state"][index].values(), own.values())
        assert_same(optimizer.state_dict()["state"][index].values(), own.values())


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{"basis": "both"}, {"diagonal": "gradients", "factors": "gradients"}], ids=str)
def test_loading_for_low_precision_parameters_keeps_the_state_exact(settings, dtype, state_dtype):
    """Torch casts state to the parameters' dtype; bases and statistics are never rounded, whatever `state_dtype` is."""
    model, optimizer = begin(state_dtype=state_dtype, **settings)
    nets.train(model, optimizer, BEFORE)
    low = copy.deepcopy(model).to(dtype)
    other = SophiaK(nets.groups(low), state_dtype=state_dtype)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(nets.parameters(optimizer), nets.parameters(other), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            chosen = state_dtype if state_dtype and name in ("exp_avg", "hessian") else torch.float32
            assert other.state[q][name].dtype == value.dtype == chosen, name
            assert torch.equal(other.state[q][name], value), name
    nets.train(low, other, AFTER, start=BEFORE)


def test_a_smaller_state_dtype_is_applied_on_load_and_to_two_of_the_tensors():
    model, optimizer = begin(basis="both", others="curvature")
    nets.train(model, optimizer, BEFORE)
    other = SophiaK(nets.groups(model), state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    for p in nets.parameters(other):
        for name, value in other.state[p].items():
            rounded = name in ("exp_avg", "hessian")
            assert value.dtype == (torch.bfloat16 if rounded else torch.float32), name
            torch.testing.assert_close(value.float(), optimizer.state[p][name], rtol=2**-8, atol=0)
    nets.train(model, other, AFTER, start=BEFORE)


def test_momentum_in_bf16_is_rounded_without_bias():
    """A tenth of the last place a step, which rounding to nearest would lose."""
    p = nn.Parameter(torch.zeros(100, 200))
    optimizer = SophiaK(
        [p], lr=0.0, betas=(0.999, 0.95), state_dtype=torch.bfloat16, diagonal="gradients", basis="none"
    )
    p.grad = torch.ones(100, 200)
    optimizer.step()
    optimizer.state[p]["exp_avg"].fill_(0.5)
    for _ in range(4):
        optimizer.step()
    expected = 0.5 * 0.999**4 + 1 - 0.999**4
    assert float(optimizer.state[p]["exp_avg"].double().mean()) == pytest.approx(expected, rel=1e-4)


def test_a_group_added_later_has_its_own_settings_and_survives_a_resume():
    model, optimizer = begin()
    late = nn.Linear(nets.CLASSES, nets.CLASSES)
    with torch.no_grad():
        late.weight.copy_(torch.eye(nets.CLASSES))
    model.head = nn.Sequential(model.head, late)
    model.head.weight = model.head[0].weight  # the loop asks for its dtype
    nets.train(model, optimizer, 4)
    own = {"basis": "both", "others": "curvature", "lr": 0.01, "orthogonalize": 0}
    optimizer.add_param_group({"params": [*late.parameters()], **own})
    group = optimizer.param_groups[-1]
    assert {name: group[name] for name in own} == own
    assert (group["clock"], group["last_refresh"]) == (4, 3)
    nets.train(model, optimizer, 1, start=4)
    assert optimizer.state[late.weight].keys() >= {"row_basis", "column_basis", "hessian"}
    assert not optimizer.state[late.weight]["hessian"].any()
    torch.testing.assert_close(late.weight.detach(), torch.eye(nets.CLASSES), rtol=0, atol=0)  # holds still

    twin = copy.deepcopy(model)
    groups = [
        *nets.groups(nn.ModuleDict({"first": twin.first, "second": twin.second, "head": twin.head[0]})),
        {"params": [*twin.head[1].parameters()]},
    ]
    other = SophiaK(groups)
    other.load_state_dict(optimizer.state_dict())
    nets.train(twin, other, 3, start=5)
    nets.train(model, optimizer, 3, start=5)
    assert_same(everything(twin, other), everything(model, optimizer))
    assert not torch.equal(late.weight.detach(), torch.eye(nets.CLASSES))


def sophia_g(model, **settings):
    optimizer = SophiaG([{k: v for k, v in group.items() if k != "hidden"} for group in nets.groups(model)], **settings)
    nets.train(model, optimizer, BEFORE)
    return optimizer


def test_sophia_gs_state_is_momentum_without_curvature():
    """A diagonal that was not bias-corrected is not known to be whole: parameters that use it hold until a refresh."""
    model = nets.build(torch.float32)
    old = sophia_g(model, curvature_interval=3, lr=0.01)
    optimizer = SophiaK(nets.groups(model), others="curvature")
    optimizer.load_state_dict(old.state_dict())
    for p in nets.parameters(optimizer):
        own = optimizer.state[p]
        assert torch.equal(own["exp_avg"], old.state[p]["exp_avg"])
        assert (own["step"], own["refreshes"]) == (BEFORE, 0)
    group = optimizer.param_groups[0]
    assert (group["gamma"], group["curvature_interval"], group["basis"]) == (0.05, 3, "smaller")
    values = [p.detach().clone() for p in model.parameters()]
    nets.train(model, optimizer, 1, start=BEFORE)  # no refresh is due
    assert_same([p.detach() for p in model.parameters()], values)
    nets.train(model, optimizer, 1, start=BEFORE + 1)
    basis = optimizer.state[model.second.weight]["row_basis"]
    assert not torch.equal(basis, torch.eye(len(basis)))
    assert not any(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def carried_on(way, factors):
    """SophiaG's averages under SophiaK, at the next refresh, and the optimizer's state just before it."""
    model = nets.build()
    old = sophia_g(model, curvature_interval=3, lr=0.01, bias_correction=True)
    optimizer = SophiaK(nets.groups(model), others="curvature", basis="both", factors=factors)
    optimizer.load_state_dict(old.state_dict())
    if way == "saved":  # once more, in between
        saved = optimizer.state_dict()
        optimizer = SophiaK(nets.groups(model), others="curvature")
        optimizer.load_state_dict(saved)
    if way == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    p = model.second.weight
    assert torch.equal(optimizer.state[p]["row_basis"], torch.eye(nets.CLASSES, dtype=torch.float64))
    value = p.detach().clone()
    nets.train(model, optimizer, 1, start=BEFORE)
    assert not torch.equal(p, value)  # it moves by what it has, in the identity
    before = optimizer.state[p]["hessian"].clone()
    if (
        factors == "curvature"
    ):  # the sixth step ends with a basis of gradients, the seventh begins with one of curvature
        nets.train(model, optimizer, 1, start=BEFORE + 1)
    return optimizer, p, before


@pytest.mark.parametrize("way", ["loaded", "saved", "copied"])
@pytest.mark.parametrize("factors", ["curvature", "gradients"])
def test_sophia_gs_bias_corrected_diagonal_is_taken_along_into_the_first_bases(factors, way):
    """They are all eigenvectors, and no step from the identity towards them."""
    optimizer, p, before = carried_on(way, factors)
    own = optimizer.state[p]
    for side in ("row", "column"):
        seen = own[f"{side}_basis"].T @ own[f"{side}_statistics"] @ own[f"{side}_basis"]
        torch.testing.assert_close(seen, seen.diagonal().diag(), rtol=0, atol=1e-10 * float(seen.max()))
        assert not torch.equal(own[f"{side}_basis"], torch.eye(len(seen), dtype=torch.float64))
    if factors == "curvature":  # the third estimate, of which the statistics are made alone
        weight = (1 - 0.99) / (1 - 0.99**3)
        carried = own["row_basis"].square().T @ before @ own["column_basis"].square()
        fresh = (own["hessian"] - (1 - weight) * carried) / weight
        torch.testing.assert_close(
            fresh.sum(1), (own["row_basis"].T @ own["row_statistics"] @ own["row_basis"]).diagonal()
        )
    assert not optimizer._unturned


def test_adamws_state_is_momentum():
    model = nets.build(torch.float32)
    adamw = torch.optim.AdamW(nets.groups(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    optimizer = SophiaK(nets.groups(model))
    optimizer.load_state_dict(adamw.state_dict())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"]) for p in model.parameters())
    with pytest.raises(RuntimeError, match="refresh_curvature"):
        optimizer.step()
    nets.train(model, optimizer, 2)


def test_a_state_dict_of_another_model_is_refused():
    model, optimizer = begin()
    nets.train(model, optimizer, 1)
    model.second.weight = nn.Parameter(torch.zeros(3, 4))
    other = SophiaK(nets.groups(model))
    with pytest.raises(
        ValueError, match=r"of parameter 2 in the state dict has shape \(5, 7\), the parameter \(3, 4\)"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
