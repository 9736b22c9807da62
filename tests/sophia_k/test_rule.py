"""The rule: every setting, shape and dtype against the float64 reference."""

import numpy as np
import pytest
import torch
from torch import nn

from sophia import SophiaK
from sophia.optim import kernels
from tests.sophia_k import drawn
from tests.sophia_k.reference import Parameter
from tests.test_rule import DEVICES

# Where a step runs, and whether its passes over memory are fused, which they are on the CPU alone.
PLACES = [(device, False) for device in DEVICES]
if kernels.problem("cpu") is None:
    PLACES.append(("cpu", True))

# |result − reference|, relative to the size of the numbers. One place for all tests of the rule. Eigenvectors of fp32
# statistics are off by the rounding over the gap between eigenvalues, and what is clipped or orthogonalized with them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}

SHAPES = [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1)]
# γ with which some coordinates of what is drawn are clipped and some are not; with the default nearly all are.
GAMMA = 0.2
PLAIN = {"orthogonalize": 0, "update_rms": None, "nesterov": False}
SETTINGS = [
    {},
    {"basis": "both"},
    {"basis": "none"},
    {"basis": "both", **PLAIN},
    {"basis": "both", "max_basis_dim": 5, **PLAIN},
    {"basis": "smaller", "max_basis_dim": 3},
    {"exponent": 1.0, **PLAIN},
    {"exponent": 1.0, "basis": "both"},
    {"exponent": 0.75, "clip": False, "basis": "both"},
    {"clip": False, **PLAIN},
    {"orthogonalize": 1},
    {"orthogonalize": 0},
    {"update_rms": None},
    {"update_rms": 1.5},
    {"nesterov": False},
    {"maximize": True, "basis": "both"},
    {"betas": (0.0, 0.0), "basis": "both"},
    {"betas": (0.5, 0.9), "weight_decay": 0.0, "basis": "both"},
    {"gamma": 0.0, "eps": 1e-3},
    {"gamma": 3.0, "eps": 0.5, "basis": "both"},
    {"diagonal": "gradients", "exponent": 1.0, "gamma": 1.0},
    {"diagonal": "gradients", "basis": "both", **PLAIN},
    {"factors": "gradients", "diagonal": "gradients", "exponent": 0.5, "gamma": 1.0, "basis": "both"},
    {"factors": "gradients", "diagonal": "gradients", "clip": False, **PLAIN},
    {"factors": "gradients"},
    {"factors": "gradients", "basis": "both", **PLAIN},
    {"rtol": 0.3, "basis": "both"},
    {"rtol": 0.6, **PLAIN},
    {"exponent": 0.0, "gamma": 0.5},
    {"exponent": 0, "clip": False, "basis": "both", **PLAIN},
    {"hidden": False, "curvature_interval": 10},
    {"hidden": False, "curvature_interval": 10, "nu": 0.0},
    {"hidden": False, "curvature_interval": 10, "nu": 0.3, "maximize": True},
    {"hidden": False, "curvature_interval": 10, "nu": 1},
    {"hidden": False, "others": "curvature"},
    {"hidden": False, "others": "curvature", "maximize": True, "update_rms": None},
]


def compare(found, expected, dtype, what):
    found = found.detach().cpu().double().numpy()
    error = np.abs(found - expected).max()
    assert error <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max()), f"{what}: error {error:.3g} at {dtype}"


def compare_state(own, reference, dtype):
    """Signs of eigenvectors are free, and nothing else."""
    names = {"step", "refreshes", "exp_avg", "hessian" if reference.source == "curvature" else "exp_avg_sq"}
    for side, turns in zip(("row", "column"), reference.turns, strict=True):
        names |= {f"{side}_statistics", f"{side}_basis"} if turns else set()
    assert own.keys() == names
    assert (own["step"], own["refreshes"]) == (reference.steps, reference.refreshes)
    assert all(value.dtype == dtype for name, value in own.items() if name not in ("step", "refreshes"))
    compare(own["exp_avg"], reference.m, dtype, "m")
    compare(own.get("hessian", own.get("exp_avg_sq")), reference.squares, dtype, "D")
    for number, side in enumerate(("row", "column")):
        if reference.turns[number]:
            compare(own[f"{side}_statistics"], reference.statistics[number], dtype, f"statistics of {side}s")
            compare(own[f"{side}_basis"].abs(), np.abs(reference.bases[number]), dtype, f"basis of {side}s")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("device", "fused"), PLACES)
def test_matrices_agree_with_the_reference(device, fused, settings, shape, dtype):
    settings = {"lr": 0.05, "betas": (0.9, 0.8), "gamma": GAMMA, "curvature_interval": drawn.INTERVAL, **settings}
    if not settings.get("hidden", True) and settings.get("others") != "curvature":
        del settings["gamma"]  # Adam's rule has none
    theta, grads, estimates = drawn.draw(shape, dtype)
    if not settings.get("hidden", True):
        estimates = [None if e is None else e.square().sum(0) for e in estimates]
    p, optimizer, reference = drawn.run(theta, grads, estimates, device, fused, **settings)
    compare(p, reference.theta, dtype, "θ")
    compare_state(optimizer.state[p], reference, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"nu": 0.0}, {"nu": 0.3}, {"nu": 1.0}, {"others": "curvature"}, {"others": "curvature", **PLAIN}],
    ids=str,
)
@pytest.mark.parametrize(("device", "fused"), PLACES)
def test_what_is_no_matrix_agrees_with_the_reference(device, fused, settings, shape, dtype):
    settings = {"lr": 0.05, "betas": (0.9, 0.8), "gamma": GAMMA, **settings}
    p, optimizer, reference = drawn.run(*drawn.draw(shape, dtype), device, fused, **settings)
    compare(p, reference.theta, dtype, "θ")
    compare_state(optimizer.state[p], reference, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_some_coordinates_are_clipped_and_some_are_not(shape):
    """Else the table above would not see a wrong γ, ε or clip."""
    _, _, reference = drawn.run(*drawn.draw(shape), betas=(0.9, 0.8), basis="both", gamma=GAMMA)
    for exponent in (1.0, 0.5):
        u = reference.turned(reference.m) / (GAMMA * reference.squares**exponent)
        assert 0.1 < (np.abs(u) > 1).mean() < 0.9


GROUPS = [
    {"basis": "both", "lr": 0.1},
    {"gamma": 1.0, "orthogonalize": 0, "betas": (0.5, 0.5)},
    {"factors": "gradients", "diagonal": "gradients", "weight_decay": 0.0},
    {"hidden": False, "others": "curvature", "update_rms": None},
    {"hidden": False},
    {"hidden": False, "nu": 1.0},
    {"others": "curvature"},
]
GROUP_SHAPES = [(5, 5), (4, 6), (6, 4), (3, 4), (4, 3), (3, 2), (5,)]


def _drawn_for(shape, settings, dtype, seed):
    theta, grads, estimates = drawn.draw(shape, dtype, seed=seed, chunks=drawn.CHUNKS - seed % 3)
    if len(shape) == 2 and not settings.get("hidden", True):
        estimates = [None if e is None else e.square().sum(0) for e in estimates]
    return theta, grads, estimates


def _both(groups, shapes, dtype=torch.float64, given=None, **general):
    """Parameters, the optimizer with one group each, references, and rows for `drawn.advance`."""
    general = {"lr": 0.05, "betas": (0.9, 0.8), "gamma": GAMMA, "curvature_interval": drawn.INTERVAL, **general}
    columns = given or [_drawn_for(s, g, dtype, seed) for seed, (s, g) in enumerate(zip(shapes, groups, strict=True))]
    params = [nn.Parameter(theta.clone()) for theta, _, _ in columns]
    optimizer = SophiaK([{"params": [p], **own} for p, own in zip(params, groups, strict=True)], **general)
    references = [
        Parameter(theta.double().numpy(), **{**general, **own})
        for (theta, _, _), own in zip(columns, groups, strict=True)
    ]
    rows = [
        ([grads[t] for _, grads, _ in columns], [e[t] for _, _, e in columns] if t in drawn.REFRESHED else None)
        for t in range(drawn.STEPS)
    ]
    return params, optimizer, references, rows


def _compare_all(params, optimizer, references):
    for p, reference in zip(params, references, strict=True):
        compare(p, reference.theta, p.dtype, "θ")
        compare_state(optimizer.state[p], reference, p.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_groups_of_many_settings(dtype):
    params, optimizer, references, rows = _both(GROUPS, GROUP_SHAPES, dtype)
    drawn.advance(optimizer, params, references, rows)
    _compare_all(params, optimizer, references)


def test_parameters_that_some_refreshes_and_some_gradients_leave_out():
    """Each counts its own refreshes and steps, and holds still until its first refresh."""
    params, optimizer, references, rows = _both(GROUPS, GROUP_SHAPES)
    rows = [
        (
            [None if (t + i) % 4 == 0 else g for i, g in enumerate(grads)],
            None if estimates is None else [None if (t + i) % 3 == 0 else e for i, e in enumerate(estimates)],
        )
        for t, (grads, estimates) in enumerate(rows)
    ]
    with pytest.warns(UserWarning, match=r"have gradients, but the curvature refresh did not reach"):
        drawn.advance(optimizer, params, references, rows)
    assert len({reference.refreshes for reference in references}) > 1
    _compare_all(params, optimizer, references)


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "both"},
        {"factors": "gradients", "diagonal": "gradients"},
        {"diagonal": "gradients", "exponent": 0.5, "gamma": 1.0},
        {"others": "curvature", "hidden": False},
    ],
    ids=str,
)
def test_a_group_that_is_added_between_two_refreshes(settings):
    params, optimizer, references, rows = _both([{}], [(5, 5)])
    drawn.advance(optimizer, params, references, rows[:2])
    theta, grads, estimates = _drawn_for((4, 5), settings, torch.float64, seed=9)
    late = nn.Parameter(theta.clone())
    optimizer.add_param_group({"params": [late], **settings})
    general = {"lr": 0.05, "betas": (0.9, 0.8), "gamma": GAMMA, "curvature_interval": drawn.INTERVAL}
    references.append(Parameter(theta.numpy(), **{**general, **settings}))
    rows = [
        ([*own, grads[t]], None if given is None else [*given, estimates[t]]) for t, (own, given) in enumerate(rows)
    ]
    drawn.advance(optimizer, [*params, late], references, rows[2:])
    _compare_all([*params, late], optimizer, references)


def transposed(x):
    return x.mT.contiguous().mT


def strided(x):
    holder = torch.zeros(*x.shape, 2, dtype=x.dtype)
    holder[..., 0] = x
    return holder[..., 0]


@pytest.mark.parametrize("layout", [transposed, strided], ids=lambda f: f.__name__)
def test_layouts_do_not_matter(layout):
    theta, grads, estimates = drawn.draw((5, 4))
    estimates = [None if e is None else layout(e) for e in estimates]
    p = nn.Parameter(layout(theta))
    optimizer, reference = SophiaK([p], basis="both"), Parameter(theta.numpy(), basis="both")
    for g, e in zip(grads, estimates, strict=True):
        if e is not None:
            optimizer.update_curvature([e])
            reference.refresh(e.numpy())
        p.grad = layout(g)
        optimizer.step()
        reference.step(g.numpy())
    assert p.stride() == layout(theta).stride()
    compare(p, reference.theta, torch.float64, "θ")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "settings", [{"basis": "both"}, {}, {"factors": "gradients", "diagonal": "gradients"}], ids=str
)
def test_matrices_without_elements(shape, settings):
    p, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(3))
    optimizer = SophiaK([p, other], **settings)
    for _ in range(3):
        optimizer.update_curvature([torch.zeros(2, *shape), torch.ones(3)])
        p.grad, other.grad = torch.zeros(shape), torch.ones(3)
        optimizer.step()
    assert bool((other < 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_have_precise_state(dtype):
    """The parameters are rounded in each step, the state never."""
    theta, grads, estimates = drawn.draw((5, 4), dtype)
    p, optimizer, reference = drawn.run(theta, grads, estimates, lr=0.05, basis="both")
    assert p.dtype == dtype
    error = np.abs(p.detach().double().numpy() - reference.theta).max()
    assert error < drawn.STEPS * torch.finfo(dtype).eps * np.abs(reference.theta).max()
    compare_state(optimizer.state[p], reference, torch.float32)


@pytest.mark.parametrize("basis", ["none", "both"])
@pytest.mark.parametrize(("dtype", "given"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_curvature_may_come_in_another_dtype(dtype, given, basis):
    """As for Sophia, which takes any floating point."""
    theta, grads, estimates = drawn.draw((5, 4), torch.float32)
    estimates = [None if e is None else e.to(given) for e in estimates]
    p, optimizer, reference = drawn.run(theta.to(dtype), [g.to(dtype) for g in grads], estimates, lr=0.05, basis=basis)
    compare(p, reference.theta, torch.float32, "θ")
    assert optimizer.state[p]["hessian"].dtype == dtype


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{"basis": "both"}, {"diagonal": "gradients", "factors": "gradients"}], ids=str)
def test_the_state_dtype_is_that_of_momentum_and_curvature(settings, state_dtype):
    theta, grads, estimates = drawn.draw((5, 4), torch.float32)
    settings = {"lr": 0.05, "curvature_interval": drawn.INTERVAL, **settings}
    p = nn.Parameter(theta.clone())
    optimizer = SophiaK([p], state_dtype=state_dtype, **settings)
    reference = Parameter(theta.double().numpy(), **settings)
    rows = [([g], None if e is None else [e]) for g, e in zip(grads, estimates, strict=True)]
    drawn.advance(optimizer, [p], [reference], rows)
    own = optimizer.state[p]
    for name, value in own.items():
        chosen = state_dtype if name in ("exp_avg", "hessian") else torch.float32
        assert value.dtype == chosen, name
    # Rounding of the state moves what is orthogonalized: a hundredth of what the steps add up to.
    coarse = state_dtype == torch.bfloat16
    error = np.abs(p.detach().double().numpy() - reference.theta).max()
    assert error <= (0.02 if coarse else TOLERANCE[torch.float32]) * np.abs(reference.theta).max()
