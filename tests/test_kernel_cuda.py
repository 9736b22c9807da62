"""The Triton kernels against the float64 reference: on a CUDA device, or in Triton's interpreter on the CPU."""

import pytest
import torch
from torch import nn

from sophia import Sophia
from sophia.optim import kernels, rounding, update
from tests.interpreter import DEVICE, HAS_TRITON, INTERPRETED, runs_kernels
from tests.models import same
from tests.reference import reference_sophia

# |result − reference|, relative to the size of the numbers (about 1).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# A tile has 1024 elements: below, at, above, several, none.
SHAPES = [(3, 5), (1024,), (1025,), (2, 1030), (0, 4), (), (1, 1), (33, 31)]
SETTINGS = {"lr": 0.05, "beta1": 0.9, "gamma": 2.0, "eps": 1e-12, "weight_decay": 0.1}


def draw(shapes, dtypes=(torch.float32,) * 4, seed=0):
    """θ, g, m, h for each shape: some coordinates are clipped, some are not."""
    generator = torch.Generator().manual_seed(seed)
    columns = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    columns[3] = [h.square() for h in columns[3]]
    return [[t.to(DEVICE, dtype) for t in column] for column, dtype in zip(columns, dtypes, strict=True)]


def counter():
    return torch.zeros((), dtype=torch.int64, device=DEVICE)


def step(columns, **settings):
    update.sophia(*columns, path="fused", **{**SETTINGS, **settings})


def expected(columns, **settings):
    """θ and m after the step in float64, and the number of clipped coordinates."""
    s = {**SETTINGS, **settings}
    thetas, momenta, clipped = [], [], 0
    for p, g, m, h in zip(*([t.cpu().double() for t in column] for column in columns), strict=True):
        new = s["beta1"] * m + (1 - s["beta1"]) * (-g if s.get("maximize") else g)
        bound = (s["gamma"] * h).clamp_min(s["eps"])
        clipped += int((new.abs() > bound).sum())
        thetas.append(p * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * (new / bound).clamp(-1, 1))
        momenta.append(new)
    return thetas, momenta, clipped


def close(results, references, dtype):
    for result, reference in zip(results, references, strict=True):
        torch.testing.assert_close(result.cpu().double(), reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ---- the step


@runs_kernels
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_launch_for_all_shapes_equals_the_reference(dtype, grad, state):
    columns = draw(SHAPES, (dtype, grad, state, state))
    thetas, momenta, clipped = expected(columns)
    count = counter()
    step(columns, clipped=count)
    close(columns[0], thetas, dtype)
    close(columns[2], momenta, state)
    if state == torch.float32:
        assert int(count) == clipped


@runs_kernels
@pytest.mark.parametrize(
    "settings",
    [{"maximize": True}, {"gamma": 0.0}, {"beta1": 0.0}, {"weight_decay": 0.0}, {"eps": 0.5}, {"lr": 1}, {"lr": 0}],
    ids=str,
)
def test_settings(settings):
    columns = draw(SHAPES, seed=1)
    thetas, momenta, clipped = expected(columns, **settings)
    count = counter()
    step(columns, clipped=count, **settings)
    close(columns[0], thetas, torch.float32)
    close(columns[2], momenta, torch.float32)
    assert int(count) == clipped


@runs_kernels
def test_the_learning_rate_may_be_on_the_device():
    one, other = draw([(5, 7)]), draw([(5, 7)])
    step(one, lr=0.25)
    step(other, lr=torch.tensor(0.25, dtype=torch.float64, device=DEVICE))
    assert torch.equal(one[0][0], other[0][0])


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", [(1, 0, 0, 0), (0, 1, 2, 3), (3, 3, 3, 3), (8, 8, 8, 8)])
def test_views_that_are_not_aligned_touch_nothing_beside_them(offsets, dtype):
    """Arrays that begin within a 16-byte word, as shards in a flat buffer do."""
    size, sentinel = 2100, 7.0
    columns, buffers = [], []
    for values, offset in zip(draw([(size,)], (dtype,) * 4, seed=2), offsets, strict=True):
        buffer = torch.full((size + offset + 9,), sentinel, dtype=dtype, device=DEVICE)
        view = buffer[offset : offset + size]
        view.copy_(values[0])
        buffers.append(buffer)
        columns.append([view])
    thetas, momenta, _ = expected(columns)
    step(columns)
    close(columns[0], thetas, dtype)
    close(columns[2], momenta, dtype)
    for buffer, offset in zip(buffers, offsets, strict=True):
        assert (buffer[:offset] == sentinel).all()
        assert (buffer[offset + size :] == sentinel).all()


@runs_kernels
def test_what_there_is_no_kernel_for_takes_the_plain_path():
    shapes = [(6, 4), (6, 4), (6, 4), (6, 4)]
    columns = draw(shapes, seed=3)
    for column in columns:
        column[1] = column[1].t().contiguous().t()  # one order, no gaps: a flat vector like another
    columns[1][2] = columns[1][2].t().contiguous().t()  # only the gradient is transposed
    for column in columns:
        column[3] = column[3].double()
    thetas, momenta, clipped = expected(columns)
    found = kernels.module(DEVICE).Tables().find(columns, None)
    assert found.left == [2, 3]
    assert [launch.tiles for launch in found.launches] == [2]
    count = counter()
    step(columns, clipped=count)
    close(columns[0], thetas, torch.float32)
    close(columns[2], momenta, torch.float32)
    torch.testing.assert_close(columns[0][3].cpu(), thetas[3], rtol=1e-13, atol=1e-13)
    assert int(count) == clipped


@runs_kernels
def test_nothing_but_empty_tensors_launches_nothing():
    columns = draw([(0,), (3, 0)])
    assert kernels.module(DEVICE).Tables().find(columns, None).launches == []
    step(columns, clipped=counter())


@runs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_neither_hidden_nor_spread(value):
    columns = draw([(1030,)], seed=4)
    columns[1][0][1027] = value
    thetas, momenta, _ = expected(columns)
    step(columns)
    torch.testing.assert_close(columns[0][0].cpu().double(), thetas[0], rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(columns[2][0].cpu().double(), momenta[0], rtol=2e-6, atol=2e-6, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_leaves_everything(dtype):
    columns = draw(SHAPES, (dtype,) * 4, seed=5)
    columns[1][3].fill_(float("nan"))
    before = [[t.clone() for t in column] for column in columns]
    count = counter()
    for found in (1.0, 2.0):
        step(columns, clipped=count, found_inf=torch.tensor([found], device=DEVICE), keys=[1] * len(SHAPES))
    for column, old in zip(columns, before, strict=True):
        assert all(same(t, o) for t, o in zip(column, old, strict=True))
    assert int(count) == 0
    columns[1][3].fill_(1.0)
    thetas, _, _ = expected(columns)
    step(columns, found_inf=torch.tensor(0.0, device=DEVICE))
    close(columns[0], thetas, dtype)


@runs_kernels
def test_gradients_are_divided_by_their_scale():
    scale = 1024.0
    columns, scaled = draw(SHAPES, seed=6), draw(SHAPES, seed=6)
    scaled[1] = [g * scale for g in scaled[1]]
    step(columns, maximize=True)
    step(scaled, maximize=True, grad_scale=torch.tensor([scale], device=DEVICE))
    assert all(torch.equal(one, other) for one, other in zip(columns[0], scaled[0], strict=True))


@runs_kernels
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_three_corners(dtype, state):
    """|kernel − exact| <= |plain low precision − exact| + tolerance, coordinate by coordinate in the mean."""
    columns = draw([(4000,)], (dtype, dtype, state, state), seed=7)
    (p,), (g,), (m,), (h,) = ([t.clone() for t in column] for column in columns)
    thetas, momenta, _ = expected(columns)
    m = m.to(dtype).mul_(SETTINGS["beta1"]).add_(g, alpha=1 - SETTINGS["beta1"])
    bound = (h.to(dtype) * SETTINGS["gamma"]).clamp_min(SETTINGS["eps"])
    p = p.mul_(1 - SETTINGS["lr"] * SETTINGS["weight_decay"]).sub_(SETTINGS["lr"] * (m / bound).clamp(-1, 1))
    step(columns)
    for ours, plain, exact in ((columns[0][0], p, thetas[0]), (columns[2][0], m.to(state), momenta[0])):
        own, other = ((t.cpu().double() - exact).abs().mean() for t in (ours, plain))
        assert own <= other + 1e-7


# ---- stochastic rounding


@runs_kernels
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("t", [0, 3, (1 << 31) + 5, (1 << 40) + 1])
def test_momentum_is_rounded_as_rounding_specifies(t, transposed):
    shapes = [(50, 41), (1024,), (7,)]
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    keys = [rounding.tensor_key(5, number, rounding.EXP_AVG) for number in range(3)]
    on_host, on_device = draw(shapes, dtypes, seed=8), draw(shapes, dtypes, seed=8)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.71828, 1e-40, -3e38, 0.0])
    special[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # CUDA's NaN: noise would wrap it
    for columns in (on_host, on_device):
        columns[1][2].copy_(special)
        if transposed:
            for column in columns:
                column[0] = column[0].t().contiguous().t()
    wanted = []
    for g, key in zip(on_host[1], keys, strict=True):
        m = torch.empty_like(g, dtype=torch.bfloat16)
        rounding.write_(m, g, rounding.step_key(key, t))  # β1 = 0: m is g
        wanted.append(m)
    step(on_host, beta1=0.0, keys=keys, step=t)
    step(on_device, beta1=0.0, keys=keys, step=torch.tensor(t, device=DEVICE))
    for columns in (on_host, on_device):
        for m, right in zip(columns[2], wanted, strict=True):
            finite = torch.isfinite(right)
            assert same(m[finite], right[finite])
            assert torch.equal(m.isnan(), right.isnan())
            assert torch.equal(m.isinf(), right.isinf())
    assert not torch.equal(wanted[1], on_host[1][1].to(torch.bfloat16))  # nearest would be another answer


@runs_kernels
def test_curvature_is_folded_and_rounded_in_one_pass():
    shapes = [(50, 41), (1024,), (0, 3), (5,)]
    keys = [rounding.tensor_key(5, number, rounding.HESSIAN) for number in range(4)]
    for state in (torch.float32, torch.bfloat16):
        _, estimates, _, hessians = draw(shapes, (torch.float32, torch.float32, state, state), seed=9)
        exact = [0.9 * h.double() + 0.1 * 0.25 * e.double() for h, e in zip(hessians, estimates, strict=True)]
        scratch = update.Scratch()
        update.fold_curvature(hessians, estimates, beta2=0.9, scale=0.25, path="fused", scratch=scratch)
        close(hessians, [h.cpu() for h in exact], state)
    wanted = [torch.empty_like(h) for h in hessians]
    for h, e, key in zip(wanted, estimates, keys, strict=True):
        rounding.write_(h, e, rounding.step_key(key, 12))
    update.fold_curvature(hessians, estimates, beta2=0.0, path="fused", scratch=scratch, keys=keys, step=12)
    assert all(same(h, right) for h, right in zip(hessians, wanted, strict=True))


# ---- through the optimizer


@runs_kernels
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_optimizer_equals_the_reference(dtype, state_dtype):
    generator = torch.Generator().manual_seed(10)
    shapes, steps = [(40, 30), (7,), (0, 2)], 6
    start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    grads = [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps)]
    estimates = [
        [300 * torch.randn(s, generator=generator).square() for s in shapes] if t in (0, 3) else None
        for t in range(steps)
    ]
    params = [nn.Parameter(p.clone().to(DEVICE)) for p in start]
    optimizer = Sophia(params, lr=0.05, fused=True, state_dtype=state_dtype)
    for t in range(steps):
        if estimates[t] is not None:
            assert optimizer.update_curvature([e.to(DEVICE) for e in estimates[t]])
        for p, g in zip(params, grads[t], strict=True):
            p.grad = g.to(DEVICE)
        optimizer.step()
    tolerance = TOLERANCE.get(torch.bfloat16 if state_dtype else dtype, 1e-12)
    for index, p in enumerate(params):
        own = [None if e is None else e[index] for e in estimates]
        reference, _, _ = reference_sophia(start[index], [g[index] for g in grads], own, lr=0.05)
        if p.numel():
            assert (p.detach().cpu().double() - reference).abs().max() <= 5 * tolerance
        assert optimizer.state[p]["step"] == steps


@runs_kernels
def test_the_device_is_told_again_only_when_an_address_changes():
    params = [nn.Parameter(torch.ones(9, device=DEVICE)) for _ in range(3)]
    optimizer = Sophia(params, fused=True)
    optimizer.update_curvature([torch.ones(9, device=DEVICE)] * 3)
    for p in params:
        p.grad = torch.ones(9, device=DEVICE)
    for _ in range(3):
        optimizer.step()
    tables = optimizer._scratch.kept["cuda"]
    assert len(tables._work) == 2  # the refresh's and the step's
    kept = [p.grad for p in params]
    for number in range(50):
        params[number % 3].grad = torch.full((9,), float(number), device=DEVICE)
        kept.append(params[number % 3].grad)  # so that no address comes twice
        optimizer.step()
    assert 2 < len(tables._work) <= 32


@runs_kernels
def test_memory_that_is_used_again_otherwise_is_looked_at_anew():
    tables, memory = kernels.module(DEVICE).Tables(), torch.zeros(4, 24, device=DEVICE)
    square = [[row.view(6, 4)] for row in memory]
    assert tables.find(square, None).left == []
    transposed = [square[0], [memory[1].as_strided((6, 4), (1, 6))], *square[2:]]
    assert tables.find(transposed, None).left == [0]
    tables.find([[row[:20]] for row in memory], None)
    (launch,) = tables.find([[row[:10]] for row in memory], None).launches
    assert launch.staging[0, 4] == 10
    (launch,) = tables.find([[row.view(torch.bfloat16)] for row in memory], None).launches
    assert launch.dtypes == ("bfloat16",) * 4


# ---- what the compiler makes of them


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, and not its interpreter")
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_memory_is_read_in_words_of_16_bytes_and_no_register_is_spilled(state):
    """Compiled for an H100 or H200, without one."""
    tl = pytest.importorskip("triton.language")
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sophia.optim.kernels import cuda, triton_kernels

    kernel = triton_kernels.step_kernel
    numbers = ("lr", "beta1", "new_weight", "gamma", "eps", "weight_decay")
    types = {"tensors": "*i64", "owners": "*i32", "clipped": "*i64", "found_inf": "*fp32", "t": "i32"}
    types.update(dict.fromkeys(numbers, "fp32"), t_address="*i64", lr_address="*fp32")
    constants = {"grad_scale": None, "MAXIMIZE": False, "STOCHASTIC": state == "bfloat16", "TILE": cuda.TILE}
    constants.update(P=tl.float32, G=tl.float32, M=getattr(tl, state), H=getattr(tl, state))
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    made = compiled(source, target=GPUTarget("cuda", 90, 32), options=cuda.OPTIONS)
    words = {"float32": (8, 4), "bfloat16": (6, 3)}[state]  # of θ, g, m, h and of θ, m: a thread has 8 elements
    assert (made.asm["ptx"].count("ld.global.v4.b32"), made.asm["ptx"].count("st.global.v4.b32")) == words
    assert "st.local" not in made.asm["ptx"]
