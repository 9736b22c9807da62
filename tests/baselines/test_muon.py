"""torch's Muon: its orthogonalisation, in the precision that torch uses, against the iteration's formula."""

import numpy as np
import pytest
import torch

from tests.baselines import references


def direction(g):
    """What torch's Muon moves a matrix by, from its gradient: one step at learning rate 1, without scale or decay."""
    p = torch.zeros(g.shape, requires_grad=True)
    p.grad = g
    torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return -p.detach().double() / max(1, g.shape[0] / g.shape[1]) ** 0.5


def in_bfloat16(g):
    """The iteration with every product rounded to bfloat16, as its authors run it; wide matrices only."""

    def rounded(x):
        return x.to(torch.bfloat16).float()

    x = rounded(g)
    x = rounded(x / rounded(x.norm()))
    for _ in range(5):
        gram = rounded(x @ x.T)
        x = rounded(3.4445 * x + rounded(-4.7750 * gram + 2.0315 * gram @ gram) @ x)
    return x.double()


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)], ids=str)
def test_newton_schulz(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = direction(g)
    exact = torch.from_numpy(references.newton_schulz(g.double().numpy()))
    same_precision = in_bfloat16(g) if shape[0] <= shape[1] else in_bfloat16(g.T).T
    assert (found - exact).norm() < 2e-2 * exact.norm()
    assert (found - same_precision).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)], ids=str)
def test_it_keeps_singular_vectors_and_makes_all_singular_values_about_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(g.double(), full_matrices=False)
    seen = u.T @ direction(g) @ v.T
    off = seen - seen.diagonal().diag()
    assert off.norm() < 2e-2 * seen.norm()
    kept = values > 0.02 * values.norm()  # five rounds bring up what is not smaller
    assert bool(((seen.diagonal()[kept] > 0.65) & (seen.diagonal()[kept] < 1.25)).all())


def test_the_formula_leaves_an_orthogonal_matrix_orthogonal_but_for_its_scale():
    """Exactly: all singular values are one number, and remain so; the iteration's fixed interval is around 1."""
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    found = references.newton_schulz(7.0 * q)
    np.testing.assert_allclose(found.T @ q, (found.T @ q)[0, 0] * np.eye(6), atol=1e-12)
    assert 0.65 < (found.T @ q)[0, 0] < 1.25
    torch.testing.assert_close(direction(torch.from_numpy(q).float()), torch.from_numpy(found), rtol=0, atol=2e-2)
