"""Passes over memory in compiled loops give what torch's operations give; where there is no loop these do it."""

import pytest
import torch
from torch import nn

from sophia import SophiaK
from sophia.optim import kernels
from sophia.optim.kernels import cpu, cpu_matrix
from tests.sophia_k import drawn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of parameters after some steps, relative to their size; those of 16 bits by a unit in the last place and a half.
TOLERANCE = {F64: 1e-12, F32: 2e-5, BF16: 1.2e-2, F16: 1.5e-3}
STEPS = 5

pytestmark = pytest.mark.skipif(kernels.problem("cpu") is not None, reason="numba is missing")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """As many threads as a test wants: work in small pieces for all of them."""
    monkeypatch.setattr(cpu, "_GRAIN", 64)
    monkeypatch.setattr(cpu, "_LEAST_PIECE", 100)


@pytest.fixture
def loops(monkeypatch):
    """Names of the loops that ran, each with its number of tensors."""
    ran = []
    run = cpu_matrix.run

    def counted(name, variant, columns, *rest):
        ran.append((name.split(".")[1], len(columns[0])))
        run(name, variant, columns, *rest)

    monkeypatch.setattr(cpu_matrix, "run", counted)
    return ran


def upright(values):
    return values


def turned_over(values):
    """The same numbers, in memory column by column."""
    return values.t().contiguous().t() if values.ndim == 2 else values


def moved(fused, *, dtype=F32, layout=upright, grad_layout=upright, steps=STEPS, **settings):
    """Parameters and momenta after some steps: three matrices alike, one tall, an embedding, a vector."""
    source = drawn.generator(5)
    shapes = [(12, 36), (12, 36), (12, 36), (36, 12), (50, 8), (13,)]
    params = [nn.Parameter(layout(drawn.normal(shape, source).to(dtype))) for shape in shapes]
    groups = [{"params": params[:4]}, {"params": params[4:], "hidden": False}]
    optimizer = SophiaK(
        groups, lr=settings.pop("lr", 0.05), fused=fused, product_dtype=F64 if dtype is F64 else F32, **settings
    )
    # In fp32 whatever the parameters' dtype, and all in one chunk: not what is tested here.
    optimizer.update_curvature([drawn.normal((3, *shape), source).float() for shape in shapes[:4]] + [None, None])
    for _ in range(steps):
        for p in params:
            p.grad = grad_layout(drawn.normal(p.shape, source).to(dtype))
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p]["exp_avg"] for p in params], optimizer


def compare(one, other):
    for found, expected in zip(one, other, strict=True):
        assert found.dtype == expected.dtype
        limit = TOLERANCE[found.dtype] * max(1.0, float(expected.abs().max()))
        assert float((found.double() - expected.double()).abs().max()) <= limit


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "nu": 0.9},
        {"nu": 0.0, "weight_decay": 0.0},
        {"maximize": True},
        {"update_rms": None, "orthogonalize": 0},
        {"basis": "none", "betas": (0.0, 0.9)},
        {"split": 3},
        {"lr": torch.tensor(0.05)},
        {"state_dtype": BF16},
        {"dtype": F64},
        {"dtype": BF16},
        {"dtype": F16},
        {"dtype": F64, "split": 3, "basis": "both"},
    ],
    ids=str,
)
def test_loops_do_what_torch_does(settings, threads, loops):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        theta, momenta, _ = moved(True, **settings)
        assert {name for name, _ in loops} >= {"ahead_loop", "adam_loop"}
        assert "add_loop" in {name for name, _ in loops}
        loops.clear()
        expected, expected_momenta, _ = moved(False, **settings)
        assert not loops
    finally:
        torch.set_num_threads(before)
    compare(theta, expected)
    compare(momenta, expected_momenta)


def test_one_call_for_matrices_that_are_turned_together(loops):
    moved(True, steps=1)
    assert loops == [("ahead_loop", 3), ("add_loop", 3), ("ahead_loop", 1), ("add_loop", 1), ("adam_loop", 2)]


def test_parts_along_the_other_side_have_no_loop_for_their_sum(loops):
    """Of three [12, 36] weights the matrices lie beside each other in rows, and none in one piece."""
    moved(True, steps=1, split=3)
    assert loops == [("ahead_loop", 3), ("ahead_loop", 1), ("add_loop", 3), ("adam_loop", 2)]


@pytest.mark.parametrize("layout", [upright, turned_over])
@pytest.mark.parametrize("grad_layout", [upright, turned_over])
@pytest.mark.parametrize("split", [1, 3])
def test_other_orders_in_memory(layout, grad_layout, split):
    given = {"layout": layout, "grad_layout": grad_layout, "dtype": F64, "split": split}
    (theta, momenta, _), (expected, expected_momenta, _) = moved(True, **given), moved(False, **given)
    compare(theta, expected)
    compare(momenta, expected_momenta)


@pytest.mark.filterwarnings("ignore:1 parameters have gradients, but the curvature refresh did not reach them")
def test_what_no_curvature_has_reached_only_gathers_momentum(loops):
    params = [nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    optimizer = SophiaK(params, fused=True)
    optimizer.update_curvature([torch.ones(1, 6, 4), None])
    for p in params:
        p.grad = torch.ones(6, 4)
    optimizer.step()
    assert not torch.equal(params[0].detach(), torch.ones(6, 4))
    assert torch.equal(params[1].detach(), torch.ones(6, 4))
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6, 4), 0.1))
    assert loops == [("ahead_loop", 1), ("add_loop", 1)]


def test_averages_that_begin_late_and_counts_of_their_own(loops):
    """Two vectors of one group whose gradients came at different times."""
    found = []
    for fused in (True, False):
        source = drawn.generator(2)
        params = [nn.Parameter(drawn.normal((9,), source)) for _ in range(2)]
        optimizer = SophiaK(params, fused=fused)
        for step in range(4):
            for number, p in enumerate(params):
                p.grad = drawn.normal((9,), source) if step >= 2 * number else None
            optimizer.step()
        found.append([p.detach() for p in params])
    compare(*found)
    assert [count for _, count in loops] == [1] * 6


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_that_are_scaled(fused):
    """As `GradScaler` hands them over to an optimizer that unscales."""
    found = []
    for scale in (1.0, 8.0):
        source = drawn.generator(4)
        params = [nn.Parameter(drawn.normal(shape, source)) for shape in ((6, 8), (7,))]
        optimizer = SophiaK(params, fused=fused)
        optimizer.update_curvature([drawn.normal((2, 6, 8), source), None])
        for p in params:
            p.grad = drawn.normal(p.shape, source) * scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        found.append([p.detach() for p in params])
    compare(*found)


def test_small_models_compile_nothing_on_their_own(loops):
    moved(None)
    assert not loops


def test_models_that_earn_the_compilation_back_take_loops_on_their_own(monkeypatch, loops):
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", {"cpu": 1000})  # of a million
    moved(None)
    assert {name for name, _ in loops} == {"ahead_loop", "adam_loop", "add_loop"}


def test_elsewhere_it_is_refused():
    with pytest.raises(ValueError, match=r"SophiaK's passes over memory are fused on the CPU only.* on meta"):
        SophiaK([nn.Parameter(torch.zeros(4, 4, device="meta"))], fused=True)
