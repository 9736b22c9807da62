"""Directions of a basis that nothing is known of: without gradients, without samples, without eigenvectors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaK
from sophia.optim.matrix_update import measured
from tests.models import Snapshot
from tests.sophia_k import nets

WIDTH, CLASSES = 16, 24


def behind_a_norm():
    """No gradient of the matrix has a component along the norm's inverse gains: [width], of length 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, CLASSES), nn.Tanh(), nn.Linear(CLASSES, 5)
        )
        with torch.no_grad():
            model[0].weight.uniform_(0.5, 2.0)
    return model, F.normalize(1 / model[0].weight.detach(), dim=0)


def share(rtol, cast=False, **settings):
    """How far a step goes there, as part of how far it goes in a direction on the average."""
    model, dead = behind_a_norm()
    weight = model[1].weight
    optimizer = SophiaK([weight], lr=0.1, weight_decay=0.0, rtol=rtol, **settings)
    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, WIDTH, generator=source), torch.randint(0, 5, (256,), generator=source)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        optimizer.refresh_curvature([lambda part=part: model(part) for part in x.split(64)])
        F.cross_entropy(model(x), y).backward()
    before = weight.detach().clone()
    optimizer.step()
    moved = weight.detach() - before
    return float((moved @ dead).norm() / (moved.norm() / WIDTH**0.5))


@pytest.mark.parametrize("orthogonalize", [0, 5])
@pytest.mark.parametrize("basis", ["both", "smaller"])
@pytest.mark.parametrize("more", [{}, {"diagonal": "gradients", "exponent": 0.5, "gamma": 1.0}], ids=str)
def test_a_direction_that_no_gradient_enters_stands_still(basis, orthogonalize, more):
    """Without `rtol` it takes about as long a step as any other, of rounding errors."""
    settings = {"basis": basis, "orthogonalize": orthogonalize, **more}
    assert share(0.0, **settings) > 0.1
    assert share(1e-4, **settings) < 0.01


@pytest.mark.parametrize("orthogonalize", [0, 5])
def test_nor_does_one_that_roundings_of_autocast_enter(orthogonalize):
    """Their curvature is some 1e-6 of the mean; Newton-Schulz steps enlarge what is small."""
    assert share(0.0, cast=True, orthogonalize=orthogonalize, basis="both") > 0.5
    assert share(1e-4, cast=True, orthogonalize=orthogonalize, basis="both") < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_stands_in_for_what_was_not_measured(dtype):
    diagonal = torch.tensor([[4.0, 2.0, 1e-9], [2.0, 4.0, 3e-9]], dtype=dtype)
    q = torch.eye(3, dtype=dtype)
    mean = float(diagonal.mean())
    found = measured(diagonal, (None, q), 1e-6)
    torch.testing.assert_close(found[:, 2], torch.full((2,), mean, dtype=dtype))
    assert torch.equal(found[:, :2], diagonal[:, :2])
    for scale in (1e-12, 1e9):  # it has no scale of its own
        torch.testing.assert_close(measured(diagonal * scale, (None, q), 1e-6), found * scale, rtol=1e-5, atol=0)
    assert measured(diagonal, (None, q), 0.0) is diagonal
    assert measured(diagonal, (None, None), 1e-6) is diagonal  # raw coordinates have no rounding there
    assert torch.equal(measured(diagonal, (q[:2, :2], None), 1e-6), diagonal)  # no row is without
    both = measured(torch.stack([diagonal, diagonal.flip(1)]), (q[:2, :2], q), 1e-6)  # of several each has its own
    torch.testing.assert_close(both, torch.stack([found, found.flip(1)]))


# ---- eigenvectors that are not found


def failing(monkeypatch, *dtypes):
    """Decompositions of these dtypes fail, as LAPACK's do now and then."""
    eigh, calls = torch.linalg.eigh, []

    def fail(matrix):
        calls.append(matrix.dtype)
        if matrix.dtype in dtypes:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    return calls


def test_a_decomposition_that_fails_is_tried_in_float64(monkeypatch):
    bases = []
    for fails in (False, True):
        model = nets.build(torch.float32)
        optimizer = SophiaK(nets.groups(model), basis="both")
        if fails:
            calls = failing(monkeypatch, torch.float32)
        assert optimizer.refresh_curvature(nets.forwards(model, nets.batch(dtype=torch.float32)[0]))
        bases.append(
            [
                optimizer.state[p][f"{side}_basis"]
                for p in (model.first.weight, model.second.weight)
                for side in ("row", "column")
            ]
        )
    assert calls == [torch.float32, torch.float64] * 4
    for one, other in zip(*bases, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other.abs(), one.abs(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_refresh_without_eigenvectors_is_refused(monkeypatch, steps):
    """Like one that is not finite: counted, nothing changed, still due."""
    model = nets.build()
    second = {"params": [model.second.weight]}
    optimizer = SophiaK([{"params": [model.first.weight]}, *([] if steps else [second])], curvature_interval=3)
    nets.train(model, optimizer, steps)
    if steps:
        optimizer.add_param_group(second)
        optimizer._create_state()
    before = Snapshot(optimizer)
    x, _ = nets.batch(steps)
    with monkeypatch.context() as patched:
        failing(patched, torch.float32, torch.float64)
        assert not optimizer.refresh_curvature(nets.forwards(model, x))
    assert optimizer.param_groups[0]["refused_refreshes"] == 1
    assert optimizer.curvature_due
    for group, old in zip(optimizer.param_groups, before.groups, strict=True):
        group.update({name: old[name] for name in ("refused_refreshes", "curvature_scale")})
    before.assert_unchanged()
    assert optimizer.refresh_curvature(nets.forwards(model, x))


def test_bases_of_gradients_wait_for_eigenvectors(monkeypatch):
    """The first one is the identity until they are found, when a basis is due again."""
    model = nets.build()
    optimizer = SophiaK([model.second.weight], factors="gradients", basis="both", curvature_interval=3)
    with monkeypatch.context() as patched:
        failing(patched, torch.float64)
        with pytest.warns(UserWarning, match=r"no eigenvectors were found for a matrix of shape \(5, 7\)"):
            nets.train(model, optimizer, 1)
    own = optimizer.state[model.second.weight]
    nets.train(model, optimizer, 1, start=1)
    assert torch.equal(own["row_basis"], torch.eye(5, dtype=torch.float64))
    nets.train(model, optimizer, 1, start=2)
    seen = own["row_basis"].T @ own["row_statistics"] @ own["row_basis"]
    torch.testing.assert_close(seen, seen.diagonal().diag(), rtol=0, atol=1e-12 * float(seen.max()))
