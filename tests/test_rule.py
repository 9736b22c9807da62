"""The rule: every path, dtype, layout and setting against the float64 reference, and its reductions."""

import pytest
import torch

from sophia import Sophia
from sophia.optim import update
from tests.reference import reference_sophia

# |result − reference|, relative to the size of the numbers (about 1). One place for all tests of the rule.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

STEPS = 7
REFRESHED = {0, 3}  # steps at whose beginning an estimate is folded in


def contiguous(x):
    return x


def transposed(x):
    return x.t().contiguous().t()


def channels_last(x):
    return x.view(*x.shape, 1, 1).contiguous(memory_format=torch.channels_last).view(x.shape)


def strided(x):
    """Every second element of something larger: gaps in memory."""
    holder = torch.zeros(*x.shape, 2, dtype=x.dtype)
    view = holder[..., 0]
    view.copy_(x)
    return view


# What makes an optimizer take each path of `update`.
PATHS = {"sliced": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYOUTS = [contiguous, transposed, channels_last, strided]
SHAPES = [(3, 5), (64, 33), (1, 1), (0, 4)]
SETTINGS = [
    {},
    {"lr": 0.3, "weight_decay": 0.0},
    {"gamma": 2.0, "betas": (0.9, 0.5)},
    {"gamma": 0.0},
    {"maximize": True},
    {"betas": (0.0, 0.0)},
    {"eps": 1e-3},
]


def draw(shape, dtype, seed):
    """Gradients and curvature such that some coordinates are clipped and some are not; fp16-representable scale."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(STEPS)]
    estimates = [
        torch.randn(shape, generator=generator, dtype=torch.float64).square().mul(300) if t in REFRESHED else None
        for t in range(STEPS)
    ]
    return theta, grads, estimates


def run(theta, grads, estimates, layout=contiguous, grad_layout=contiguous, device="cpu", **settings):
    p = torch.nn.Parameter(layout(theta.clone()).to(device))
    optimizer = Sophia([p], **settings)
    for grad, estimate in zip(grads, estimates, strict=True):
        if estimate is not None:
            assert optimizer.update_curvature([estimate.to(device)])
        p.grad = grad_layout(grad.clone()).to(device)
        optimizer.step()
    return p.detach(), optimizer


def compare(result, reference, dtype):
    error = (result.cpu().double() - reference).abs().max().item() if result.numel() else 0.0
    scale = max(1.0, reference.abs().max().item() if result.numel() else 1.0)
    assert error <= TOLERANCE[dtype] * scale, f"error {error:.3g} at {dtype}"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("device", DEVICES)
def test_paths_agree_with_the_reference(device, path, dtype, shape, settings):
    theta, grads, estimates = draw(shape, dtype, seed=1)
    settings = {"lr": 0.05, **settings}
    result, optimizer = run(theta, grads, estimates, device=device, **PATHS[path], **settings)
    expected, m, h = reference_sophia(theta, grads, estimates, **settings)
    compare(result, expected, dtype)
    state = next(iter(optimizer.state.values()))
    # The state is fp32 or better whatever the parameters' dtype.
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert state["exp_avg"].dtype == state["hessian"].dtype == precise
    compare(state["exp_avg"], m, precise)
    compare(state["hessian"], h, precise)


@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", [16, 1 << 18])
def test_layouts_do_not_matter(path, layout, grad_layout, block, monkeypatch):
    monkeypatch.setattr(update, "BLOCK", block)  # 16: a small tensor is cut like a large one
    theta, grads, estimates = draw((12, 10), torch.float32, seed=2)
    result, _ = run(theta, grads, estimates, layout, grad_layout, **PATHS[path], lr=0.05)
    expected, _, _ = reference_sophia(theta, grads, estimates, lr=0.05)
    compare(result, expected, torch.float32)


def test_expanded_gradients_are_read_correctly():
    theta, _, estimates = draw((6, 4), torch.float32, seed=3)
    rows = [torch.randn(4) for _ in range(STEPS)]
    result, _ = run(theta, [row.expand(6, 4) for row in rows], estimates, grad_layout=lambda g: g, lr=0.05)
    expected, _, _ = reference_sophia(theta, [row.expand(6, 4) for row in rows], estimates, lr=0.05)
    compare(result, expected, torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_slices_and_buckets_cover_large_tensors(path, monkeypatch):
    monkeypatch.setattr(update, "BUCKET", 1000)
    shape = (update.BLOCK // 100 + 7, 101)  # more than one slice, and no multiple of it
    theta, grads, estimates = draw(shape, torch.float32, seed=4)
    small, small_grads, small_estimates = draw((5,), torch.float32, seed=5)
    params = [torch.nn.Parameter(small.clone()), torch.nn.Parameter(theta.clone()), torch.nn.Parameter(small.clone())]
    optimizer = Sophia(params, lr=0.05, **PATHS[path])
    for g, e, sg, se in zip(grads, estimates, small_grads, small_estimates, strict=True):
        if e is not None:
            optimizer.update_curvature([se, e, se])
        params[0].grad, params[1].grad, params[2].grad = sg, g, sg
        optimizer.step()
    compare(params[1].detach(), reference_sophia(theta, grads, estimates, lr=0.05)[0], torch.float32)
    compare(params[2].detach(), reference_sophia(small, small_grads, small_estimates, lr=0.05)[0], torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_state_dtype_is_kept_and_arithmetic_is_precise(path, dtype, state_dtype):
    theta, grads, estimates = draw((8, 9), dtype, seed=6)
    result, optimizer = run(theta, grads, estimates, **PATHS[path], state_dtype=state_dtype, lr=0.05)
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].dtype == state["hessian"].dtype == state_dtype
    expected, _, _ = reference_sophia(theta, grads, estimates, lr=0.05)
    # A rounded state may flip the clip of a coordinate near the bound, which costs little there.
    low = torch.bfloat16 in (dtype, state_dtype)
    compare(result, expected, torch.bfloat16 if low else torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_parameters_of_several_dtypes_and_groups(path):
    drawn = [draw((7, 3), dtype, seed=i) for i, dtype in enumerate(TOLERANCE)]
    params = [torch.nn.Parameter(theta.clone()) for theta, _, _ in drawn]
    settings = [{"lr": 0.1}, {"lr": 0.05, "gamma": 0.2}, {"lr": 0.02, "weight_decay": 0.0}, {"betas": (0.5, 0.9)}]
    optimizer = Sophia(
        [{"params": [p], **own} for p, own in zip(params, settings, strict=True)], lr=0.01, **PATHS[path]
    )
    for t in range(STEPS):
        if t in REFRESHED:
            optimizer.update_curvature([estimates[t] for _, _, estimates in drawn])
        for p, (_, grads, _) in zip(params, drawn, strict=True):
            p.grad = grads[t].clone()
        optimizer.step()
    for p, (theta, grads, estimates), own in zip(params, drawn, settings, strict=True):
        expected, _, _ = reference_sophia(theta, grads, estimates, **{"lr": 0.01, **own})
        compare(p.detach(), expected, p.dtype)


@pytest.mark.parametrize("path", PATHS)
def test_zero_curvature_is_sign_momentum(path):
    theta, grads, _ = draw((40,), torch.float64, seed=7)
    zeros = [torch.zeros(40) if t == 0 else None for t in range(STEPS)]
    result, _ = run(theta, grads, zeros, **PATHS[path], lr=0.05, weight_decay=0.0)
    m, expected = torch.zeros(40, dtype=torch.float64), theta.clone()
    for g in grads:
        m = 0.96 * m + 0.04 * g
        expected -= 0.05 * m.sign()
    compare(result, expected, torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_large_curvature_is_newton_in_momentum(path):
    theta, grads, _ = draw((40,), torch.float64, seed=8)
    curvature = torch.rand(40, dtype=torch.float64) + 1e6
    estimates = [curvature if t == 0 else None for t in range(STEPS)]
    result, _ = run(theta, grads, estimates, **PATHS[path], lr=0.05, weight_decay=0.0)
    m, expected = torch.zeros(40, dtype=torch.float64), theta.clone()
    for g in grads:
        m = 0.96 * m + 0.04 * g
        expected -= 0.05 * m / (0.05 * 0.01 * curvature)
    compare(result, expected, torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_negative_curvature_is_clipped_like_none(path):
    theta, grads, _ = draw((40,), torch.float64, seed=9)
    negative = [torch.full((40,), -5.0) if t == 0 else None for t in range(STEPS)]
    zero = [torch.zeros(40) if t == 0 else None for t in range(STEPS)]
    assert torch.equal(run(theta, grads, negative, **PATHS[path])[0], run(theta, grads, zero, **PATHS[path])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_vanishing_momentum_and_curvature_do_not_divide_zero_by_zero(path, dtype):
    # Trap 9: 1e-12 rounds to zero in fp16.
    theta = torch.ones(5, dtype=dtype)
    zeros = torch.zeros(5)
    result, _ = run(theta, [zeros.to(dtype)] * 2, [zeros, None], **PATHS[path], lr=0.1, weight_decay=0.0)
    assert torch.equal(result, theta)


def test_no_coordinate_moves_more_than_the_learning_rate():
    theta, grads, estimates = draw((500,), torch.float64, seed=10)
    before = theta.clone()
    for t in range(STEPS):
        after, _ = run(theta, grads[: t + 1], estimates[: t + 1], lr=0.05, weight_decay=0.0)
        assert (after - before).abs().max() <= 0.05 * (1 + 1e-12)
        before = after


def test_the_default_path_keeps_its_scratch():
    theta, grads, estimates = draw((64, 64), torch.bfloat16, seed=11)
    p = torch.nn.Parameter(theta)
    optimizer = Sophia([p])
    optimizer.update_curvature([estimates[0]])
    p.grad = grads[0]
    optimizer.step()
    buffers = {key: buffer.data_ptr() for key, buffer in optimizer._scratch._buffers.items()}
    optimizer.step()
    assert {key: buffer.data_ptr() for key, buffer in optimizer._scratch._buffers.items()} == buffers
    assert all(buffer.numel() <= update.BLOCK for buffer in optimizer._scratch._buffers.values())


def test_step_allocates_nothing_that_grows_with_the_model():
    size = 8 * update.BLOCK
    p = torch.nn.Parameter(torch.randn(size))
    optimizer = Sophia([p])
    optimizer.update_curvature([torch.rand(size)])
    p.grad = torch.randn(size)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert largest < 4 * update.BLOCK
