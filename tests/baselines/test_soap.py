"""SOAP: its bases and what they do to Adam, matrices of every shape, its state, what it refuses."""

import copy

import numpy as np
import pytest
import torch

from sophia.optim import soap
from sophia.optim.eigenbasis import eigenvectors, fold_outer, power_iteration, rotate, rotate_back
from sophia.optim.soap import SOAP
from tests.baselines import references

KEYS = {"step", "exp_avg", "exp_avg_sq"}
ROWS, COLUMNS = {"row_statistics", "row_basis"}, {"column_statistics", "column_basis"}


def gradients(shape, steps, seed=0):
    """Gradients with a few strong directions, as a network's have."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, size, generator=draw, dtype=torch.float64) for size in shape)
    for _ in range(steps):
        core = torch.randn(*shape, generator=draw, dtype=torch.float64)
        yield left @ (core / torch.arange(1, shape[1] + 1)) @ right


def trained(shape, *, steps=25, largest=100, interval=4, **settings):
    """A parameter and its optimizer after some steps, and where the reference has it."""
    p = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP(
        [p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, basis_interval=interval, max_precond_dim=largest, **settings
    )
    sides = tuple(size <= largest for size in shape)
    reference = references.SOAP(0.9, 0.95, interval, sides)
    theta = p.detach().numpy().copy()
    for g in gradients(shape, steps):
        p.grad = g
        optimizer.step()
        state = optimizer.state[p]
        first = [state.get(f"{side}_basis", torch.empty(0)).numpy().copy() for side in ("row", "column")]
        first = [q if turns else np.eye(size) for q, turns, size in zip(first, sides, shape, strict=True)]
        theta = reference.step(theta, g.numpy(), 0.1, 0.1, first=first if reference.t == 0 else None)
    return p, optimizer, theta


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("largest", [100, 5, 3])
def test_matrices_of_every_shape(shape, largest):
    """Turned on both sides, on the smaller one or on none. Bases of a singular first gradient are checked below."""
    # Before the statistics have full rank, power iteration completes a basis by rounding: not before the eighth step.
    p, optimizer, theta = trained(shape, largest=largest, interval=8)
    np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-8, atol=1e-8)
    expected = KEYS | (ROWS if shape[0] <= largest else set()) | (COLUMNS if shape[1] <= largest else set())
    assert set(optimizer.state[p]) == expected


@pytest.mark.parametrize("shape", [(6, 6), (7, 4)], ids=str)
def test_the_first_step_is_adams_and_then_the_gradient_is_diagonal_in_its_own_basis(shape):
    (g,) = gradients(shape, 1)
    p = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP([p], lr=0.1, weight_decay=0.0)
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.1 * g.sign(), rtol=1e-6, atol=1e-6)
    state = optimizer.state[p]
    turned = rotate(g, state["row_basis"], state["column_basis"])
    values = torch.linalg.svdvals(g)
    torch.testing.assert_close(turned.diagonal().abs(), values)
    torch.testing.assert_close(turned.square().sum(), values.square().sum())
    torch.testing.assert_close(state["exp_avg_sq"], 0.05 * turned**2)


def test_the_basis_follows_the_statistics():
    """By power iteration, every fourth step: nearly diagonal statistics, largest first, an orthonormal basis."""
    p, optimizer, _ = trained((6, 6), steps=200)
    state = optimizer.state[p]
    for side in ("row", "column"):
        basis, statistics = state[f"{side}_basis"], state[f"{side}_statistics"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
        seen = basis.T @ statistics @ basis
        off = seen - seen.diagonal().diag()
        assert off.norm() < 0.2 * seen.norm()
        assert bool((seen.diagonal().diff() <= 1e-9).all())


def test_power_iteration_moves_towards_eigenvectors_and_takes_the_squares_along():
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    statistics = root @ root.T
    exact = eigenvectors(statistics)
    shuffled = [3, 0, 4, 1, 2]
    basis, order = power_iteration(statistics, exact[:, shuffled])
    torch.testing.assert_close(basis.abs(), exact.abs())  # columns are in order again, up to signs
    assert [shuffled[index] for index in order] == [0, 1, 2, 3, 4]
    q = torch.linalg.qr(root.T)[0]
    for _ in range(300):
        q, _ = power_iteration(statistics, q)
    torch.testing.assert_close(q.abs(), exact.abs(), rtol=1e-6, atol=1e-6)


def test_turning_there_and_back():
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(5, 3, generator=draw)
    rows, columns = (torch.linalg.qr(torch.randn(size, size, generator=draw))[0] for size in (5, 3))
    for basis in ((rows, columns), (rows, None), (None, columns), (None, None)):
        torch.testing.assert_close(rotate_back(rotate(x, *basis), *basis), x)
    fold_outer(sums := torch.ones(5, 5), None, x, 0.25)
    torch.testing.assert_close(sums, 0.75 + 0.25 * x @ x.T)


def test_it_gains_from_a_basis_that_a_diagonal_lacks():
    """A quadratic with steep and flat directions across the axes: Adam zigzags where SOAP, in their basis, does not."""
    draw = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64))[0]
    curvature = q @ torch.logspace(0, -3, 8, dtype=torch.float64).diag() @ q.T
    start = torch.randn(8, 8, generator=draw, dtype=torch.float64)

    def end(largest):
        p = start.clone().requires_grad_()
        optimizer = SOAP([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, max_precond_dim=largest)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
            optimizer.zero_grad()
            loss = (p * (curvature @ p)).sum()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert end(8) < 1e-2 * end(1)


def test_a_state_dict_goes_on_bit_for_bit():
    def begin():
        p = torch.ones(6, 4, requires_grad=True)
        return p, SOAP([p], basis_interval=3)

    def go(p, optimizer, grads):
        for g in grads:
            p.grad = g.float()
            optimizer.step()

    grads = list(gradients((6, 4), 12))
    whole, optimizer = begin()
    go(whole, optimizer, grads)
    first, before = begin()
    go(first, before, grads[:5])
    p, after = begin()
    with torch.no_grad():
        p.copy_(first)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    go(p, after, grads[5:])
    assert torch.equal(p, whole)
    for key, value in optimizer.state[whole].items():
        assert torch.equal(after.state[p][key], value), key
        assert after.state[p][key].dtype == value.dtype


def test_a_closure_and_parameters_without_gradient():
    a, b = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = SOAP([a, b], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        (loss := a.sum()).backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(a.detach(), torch.full((2, 2), 0.9))
    assert b.tolist() == [1.0, 1.0]
    assert not optimizer.state[b]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, r"lr is -1\.0; it must be finite and at least 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"basis_interval": 0}, "basis_interval is 0; it must be at least 1"),
        ({"max_precond_dim": 0}, "max_precond_dim is 0"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        SOAP([torch.ones(2, 2, requires_grad=True)], **wrong)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(2, 2, 2), r"shape \(2, 2, 2\): SOAP takes matrices and vectors"),
        (torch.ones(2, 2, dtype=torch.bfloat16), "bfloat16: SOAP needs fp32 or fp64"),
    ],
)
def test_parameters_that_it_has_no_meaning_for(parameter, message):
    with pytest.raises(ValueError, match=message):
        SOAP([parameter.requires_grad_()])
    optimizer = SOAP([torch.ones(2, 2, requires_grad=True)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter]})
    assert len(optimizer.param_groups) == 1


def test_a_shard_is_refused(monkeypatch):
    monkeypatch.setattr(soap, "is_dtensor", lambda p: True)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) is a DTensor: SOAP needs whole matrices; use DDP"):
        SOAP([torch.ones(2, 3, requires_grad=True)])
