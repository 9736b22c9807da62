"""Products in bf16: near those in fp32, for a step alone, and where the hardware has them."""

import pytest
import torch
from torch import nn

from sophia import SophiaK
from sophia.optim import matrix_dtype
from sophia.optim.matrix_update import MatrixRule, direction
from tests.models import assert_same
from tests.sophia_k import drawn, nets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forgets():
    matrix_dtype.multiplies_bf16.cache_clear()
    yield
    matrix_dtype.multiplies_bf16.cache_clear()


def rule(**settings):
    standard = {"gamma": 0.2, "eps": 1e-12, "exponent": 1.0, "clip": True, "orthogonalize": 5, "update_rms": 0.2}
    return MatrixRule(**{**standard, "rtol": 1e-6, "product_dtype": None, **settings})


@pytest.mark.parametrize(("orthogonalize", "tolerance"), [(0, 0.03), (5, 0.08)])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (3, 32, 32)], ids=str)
def test_a_direction_in_bf16_is_near_the_exact_one(shape, orthogonalize, tolerance):
    """Against float64; Newton-Schulz steps enlarge rounding errors."""
    source = drawn.generator(0)
    x, diagonal = drawn.normal(shape, source), drawn.normal(shape, source).square() + 0.1
    basis = tuple(torch.linalg.qr(drawn.normal((*shape[:-2], size, size), source))[0] for size in shape[-2:])
    exact = direction(x, 0.2 * diagonal, basis, rule(orthogonalize=orthogonalize))
    low = rule(orthogonalize=orthogonalize, product_dtype=torch.bfloat16)
    found = direction(x.float(), 0.2 * diagonal.float(), tuple(q.float() for q in basis), low)
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < tolerance


def trained(dtype=torch.float32, **settings):
    model = nets.build(dtype)
    optimizer = SophiaK(nets.groups(model), lr=0.02, basis="both", curvature_interval=2, **settings)
    nets.train(model, optimizer, 4)
    return [p.detach() for p in model.parameters()], optimizer


def test_statistics_and_bases_are_exact_whatever_products_are():
    """In bf16 are the sampled gradients as D sees them, turned, and D as it is carried into the next basis."""
    states = []
    for chosen in (None, torch.bfloat16):
        p, source = nn.Parameter(torch.zeros(12, 9)), drawn.generator(3)
        optimizer = SophiaK([p], basis="both", product_dtype=chosen)
        for _ in range(4):
            optimizer.update_curvature([drawn.normal((5, 12, 9), source).float()])
        states.append(optimizer.state[p])
    exact, low = states
    assert all(torch.equal(exact[name], low[name]) for name in exact.keys() - {"hessian"})
    assert low["hessian"].dtype == torch.float32
    assert 1e-5 < (exact["hessian"] - low["hessian"]).norm() / exact["hessian"].norm() < 0.01


def has(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)


@pytest.mark.parametrize("amx", [True, False])
def test_auto_takes_what_the_hardware_has(monkeypatch, amx):
    has(monkeypatch, amx)
    found, optimizer = trained(product_dtype="auto")
    expected, _ = trained(product_dtype=torch.bfloat16 if amx else None)
    other, _ = trained(product_dtype=None if amx else torch.bfloat16)
    assert_same(found, expected)
    assert not torch.equal(found[0], other[0])
    assert {group["product_dtype"] for group in optimizer.param_groups} == {"auto"}  # a checkpoint goes to any machine


def test_auto_leaves_fp64_alone(monkeypatch):
    has(monkeypatch, True)
    assert_same(trained(torch.float64, product_dtype="auto")[0], trained(torch.float64)[0])


def test_which_hardware_that_is(monkeypatch):
    has(monkeypatch, True)
    assert matrix_dtype.multiplies_bf16(CPU)
    matrix_dtype.multiplies_bf16.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # earlier versions of torch do not say
    assert not matrix_dtype.multiplies_bf16(CPU)
    assert not matrix_dtype.multiplies_bf16(torch.device("mps"))
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, seen=capability: seen)
        matrix_dtype.multiplies_bf16.cache_clear()
        assert matrix_dtype.multiplies_bf16(torch.device("cuda", 0)) is expected


@pytest.mark.parametrize("wrong", ["bf16", torch.float16, torch.int8, 16])
def test_a_dtype_that_is_none_of_them(wrong):
    message = r"product_dtype=.* must be torch\.bfloat16, torch\.float32, 'auto' or None"
    with pytest.raises(ValueError, match=message):
        SophiaK([nn.Parameter(torch.zeros(3, 4))], product_dtype=wrong)
