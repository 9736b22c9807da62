"""The fused path on the CPU: what the rule's case table cannot show. Dtypes, threads, memory, counts and remedies."""

import gc
import importlib.util
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sophia import Sophia
from sophia.optim import kernels, update
from sophia.optim.kernels import cpu, team

SETTINGS = {"lr": 0.05, "beta1": 0.9, "gamma": 2.0, "eps": 1e-12, "weight_decay": 0.1}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# |result − float64|, relative to the size of the numbers (about 1).
TOLERANCE = {F64: 1e-14, F32: 1e-6, BF16: 8e-3, F16: 1e-3}
# A loop takes 128 elements at a time and vectors of several within.
SHAPES = [(3, 5), (0, 4), (), (128,), (127,), (129,), (256,), (1,), (3, 411)]


@pytest.fixture(autouse=True)
def one_loop(monkeypatch):
    """As many threads as a test wants, whatever the machine has: work in small pieces for all of them."""
    monkeypatch.setattr(cpu, "_GRAIN", 64)
    monkeypatch.setattr(cpu, "_LEAST_PIECE", 100)


def draw(shapes=SHAPES, dtypes=(F32,) * 4, seed=0, offset=0):
    """θ, g, m, h for each shape, at an offset in their memory; some coordinates are clipped, some are not."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for number, dtype in enumerate(dtypes):
        column = []
        for shape in shapes:
            values = torch.randn(shape, generator=generator, dtype=F64)
            values = (values.square() if number == 3 else values).to(dtype)
            column.append(torch.zeros(values.numel() + offset, dtype=dtype)[offset:].view(shape).copy_(values))
        columns.append(column)
    return columns


def clone(columns):
    return [[t.clone() for t in column] for column in columns]


def step(columns, path="fused", **settings):
    counted = torch.zeros((), dtype=torch.int64)
    update.sophia(*columns, path=path, clipped=counted, **{**SETTINGS, **settings})
    return int(counted)


def exactly(columns, maximize=False, grad_scale=1.0):
    """θ and m after a step in float64, and how many coordinates were clipped."""
    thetas, momenta, clipped = [], [], 0
    for p, g, m, h in zip(*([t.double() for t in column] for column in columns), strict=True):
        momenta.append(0.9 * m + (1 - 0.9) * (-g if maximize else g) / grad_scale)
        bound = (2.0 * h).clamp_min(1e-12)
        clipped += int((momenta[-1].abs() > bound).sum())
        thetas.append(p * (1 - 0.05 * 0.1) - 0.05 * (momenta[-1] / bound).clamp(-1, 1))
    return thetas, momenta, clipped


def worst(results, references):
    return max((r.double() - e).abs().max().item() for r, e in zip(results, references, strict=True) if r.numel())


DTYPES = [(F32,) * 4, (F64,) * 4, (BF16, BF16, F32, F32), (F16, F16, F32, F32), (BF16, F32, BF16, BF16)]
DTYPES += [(F32, F32, F32, F64)]


def test_the_kernels_can_run_where_tests_do():
    # Else every test of the fused path would be skipped, or run another path, and nobody would know.
    assert cpu.problem() is None


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_every_dtype_at_every_offset_and_number_of_threads(dtypes, monkeypatch):
    for offset, threads in ((0, 1), (1, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        columns = draw(dtypes=dtypes, offset=offset)
        thetas, momenta, clipped = exactly(columns)
        before = [t.clone() for t in columns[1] + columns[3]]
        assert step(columns) == clipped
        assert worst(columns[0], thetas) <= TOLERANCE[dtypes[0]] * 4
        assert worst(columns[2], momenta) <= TOLERANCE[dtypes[2]] * 4
        assert all(torch.equal(a, b) for a, b in zip(before, columns[1] + columns[3], strict=True))


def test_nothing_is_left_to_the_sliced_path():
    """The table above would not notice: all dtypes have loops, dense layouts alike too, others are left."""
    common = {"lr": 0.1, "beta1": 0.9, "gamma": 1.0, "eps": 1e-12, "weight_decay": 0.0, "maximize": False, "kept": {}}
    common |= {"clipped": None, "keys": None, "step": 0, "found_inf": None, "grad_scale": None}
    for dtypes in DTYPES:
        assert cpu.sophia_(*draw(dtypes=dtypes), **common) == []
    transposed = [[t.t() for t in column] for column in draw([(4, 6), (5, 3)])]
    assert cpu.sophia_(*transposed, **common) == []
    mixed = draw([(4, 6), (5, 3), (2, 2)])
    mixed[1][1] = mixed[1][1].t().contiguous().t()
    gaps = torch.randn(2, 4)[:, ::2]
    mixed[0][2] = gaps
    before = gaps.clone()
    assert cpu.sophia_(*mixed, **common) == [1, 2]
    assert torch.equal(gaps, before)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_low_precision_is_as_good_as_torchs(dtype):
    """Three corners: the kernel is no farther from fp32 than the plain path is."""
    low = draw(dtypes=(dtype, dtype, F32, F32), seed=3)
    high = [[t.float() for t in column] for column in low]
    plain, fused = clone(low), clone(low)
    step(high, "sliced")
    step(plain, "sliced")
    step(fused)
    for exact, theirs, ours in zip(high[0], plain[0], fused[0], strict=True):
        assert ((ours - exact).abs() <= (theirs - exact).abs() + 1e-6).all()


@pytest.mark.parametrize("settings", [{"maximize": True}, {"grad_scale": torch.tensor(8.0)}])
def test_sign_and_scale_of_the_gradient(settings):
    columns = draw(seed=4)
    thetas, momenta, clipped = exactly(columns, **{k: v if v is True else 8.0 for k, v in settings.items()})
    assert step(columns, **settings) == clipped
    assert worst(columns[0], thetas) <= 1e-6
    assert worst(columns[2], momenta) <= 1e-6


@pytest.mark.parametrize(
    ("column", "value"),
    [(1, float("nan")), (2, float("nan")), (3, float("nan")), (1, float("inf")), (1, -float("inf")), (3, float("inf"))],
)
def test_what_is_not_finite_goes_where_it_goes_on_the_plain_path(column, value):
    """A NaN must be seen: clipped to a number it would be a step like any other."""
    fused = draw([(300,)], seed=5)
    fused[column][0][7] = value
    plain = clone(fused)
    step(fused)
    step(plain, "sliced")
    for ours, theirs in zip(fused[0] + fused[2], plain[0] + plain[2], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_noise_does_not_wrap_a_nan():
    """CUDA's NaN has all bits set: noise added to them would make it a small number."""
    columns = draw([(300,)], (F32, F32, BF16, BF16), seed=9)
    columns[1][0].view(torch.int32).fill_(-1)
    for t in range(5):
        step(columns, keys=[t], step=t)
        assert columns[2][0].isnan().all()
        columns[2][0].zero_()


def test_found_inf_changes_nothing():
    columns = draw()
    before = clone(columns)
    assert step(columns, found_inf=torch.tensor(1.0)) == 0
    assert all(torch.equal(a, b) for x, y in zip(columns, before, strict=True) for a, b in zip(x, y, strict=True))
    assert step(columns, found_inf=torch.tensor(0.0)) > 0


@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F32), (BF16, F32), (F32, F64)], ids=str)
def test_fold(dtypes):
    h, estimate = ([t.to(dtype) for t in draw(seed=seed)[3]] for seed, dtype in zip((6, 7), dtypes, strict=True))
    expected = [0.9 * a.double() + (1 - 0.9) * 0.25 * b.double() for a, b in zip(h, estimate, strict=True)]
    update.fold_curvature(h, estimate, beta2=0.9, scale=0.25, path="fused", scratch=update.Scratch())
    assert worst(h, expected) <= TOLERANCE[dtypes[0]] * 8


def test_without_openmp_threads_of_ours_do_the_same(monkeypatch):
    columns = draw([(1000, 3)], seed=8)
    other = clone(columns)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    counted = step(columns)
    monkeypatch.setattr(team, "_openmp", lambda: None)
    for _ in range(2):  # the second time with the threads of the first
        again = clone(other)
        assert step(again) == counted
        assert torch.equal(again[0][0], columns[0][0])
    assert team._pool.cache_info().currsize == 1


def test_it_takes_as_many_threads_as_torch_and_leaves_the_number(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu.team, "run", lambda loop, work, threads: asked.append(threads))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            step(draw([(1000,)]))
        step(draw([(100,)]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert asked == [1, 2, 1]  # the last work is too little for two


def test_another_lr_compiles_nothing():
    step(draw())
    compiled = cpu._loop.cache_info().misses
    for lr in (0.1, 1, torch.tensor(0.3), torch.tensor(0.3, dtype=F64)):
        step(draw(), lr=lr)
    assert cpu._loop.cache_info().misses == compiled


def test_step_allocates_nothing_that_grows_with_the_model():
    size = 1 << 21
    p = nn.Parameter(torch.randn(size))
    optimizer = Sophia([p], fused=True)
    optimizer.update_curvature([torch.rand(size)])
    p.grad = torch.randn(size)
    optimizer.step()
    gc.collect()
    tracemalloc.start()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(abs(event.self_cpu_memory_usage) for event in profile.key_averages()) < 4096
    assert peak < 1 << 20  # of which the profiler has its part; a copy of the parameter takes 8 MiB


# ---- the choice of the path


def problem_without(monkeypatch, error):
    """kernels.cpu as it finds itself where numba is missing, or broken."""

    def fail(name):
        raise ImportError(error)

    util = SimpleNamespace(find_spec=lambda name: None if error is None else importlib.util.find_spec(name))
    monkeypatch.setattr(cpu, "importlib", SimpleNamespace(util=util, import_module=fail))
    monkeypatch.setattr(cpu, "problem", cpu.problem.__wrapped__)


@pytest.mark.parametrize("error", [None, "Numba needs NumPy 2.3 or less"])
def test_without_numba_none_falls_back_and_true_says_what_to_install(monkeypatch, error):
    problem_without(monkeypatch, error)
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", {})
    remedy = "pip install 'sophia-lm\\[train\\]'" if error is None else "Numba needs NumPy 2.3 or less.*versions"
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=f"fused=True cannot run: numba .*{remedy}.*fused=None"):
        Sophia([p], fused=True)
    optimizer = Sophia([p])
    optimizer.update_curvature([torch.ones(3)])
    p.grad = torch.ones(3)
    monkeypatch.setattr(cpu, "run", None)  # no loop
    optimizer.step()
    assert (p != 1).all()


def test_few_parameters_wait_for_no_compiler(monkeypatch):
    """The default: a second of compilation only where steps can earn it back, all groups together."""
    taken = []
    monkeypatch.setattr(update, "sophia", lambda *columns, path, **settings: taken.append(path))
    monkeypatch.setattr(update, "fold_curvature", lambda *columns, path, **settings: taken.append(path))
    for size, path in (((1 << 20) - 4, "sliced"), ((1 << 20) - 3, "fused")):
        params = [nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(3))]
        optimizer = Sophia([{"params": [p]} for p in params])
        optimizer.update_curvature([torch.ones_like(p) for p in params])
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert set(taken) == {path}
        taken.clear()


# ---- the clipped fraction


def make(**settings):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(40)), nn.Parameter(torch.randn(300))]
    optimizer = Sophia([{"params": params[:1]}, {"params": params[1:], "gamma": 0.2}], fused=True, **settings)
    optimizer.update_curvature([torch.rand_like(p) * 60 for p in params])
    for p in params:
        p.grad = torch.randn_like(p)
    return optimizer, params


def fraction(optimizer):
    """From the state, whatever was counted."""
    clipped = total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            m, h = (optimizer.state[p][name].double() for name in ("exp_avg", "hessian"))
            clipped += int((m.abs() > (group["gamma"] * h).clamp_min(group["eps"])).sum())
            total += m.numel()
    return clipped / total


def test_the_steps_own_count_is_the_clip_fraction(monkeypatch):
    optimizer, params = make()
    counts = []
    statistics = update.statistics

    def spy(*tensors, count, **settings):
        counts.append(count)
        return statistics(*tensors, count=count, **settings)

    monkeypatch.setattr(update, "statistics", spy)
    for _ in range(3):
        optimizer.step()
        expected = fraction(optimizer)
        assert 0.05 < expected < 0.95
        assert float(optimizer.stats()["clip_fraction"]) == pytest.approx(expected)
        params[0].grad *= 3
    assert counts == [False] * 6


@pytest.mark.parametrize("change", ["curvature", "load", "gamma", "no gradient", "another path"])
def test_a_count_that_no_longer_holds_is_not_used(change):
    optimizer, params = make()
    optimizer.step()
    before = fraction(optimizer)
    if change == "curvature":
        optimizer.update_curvature([torch.full_like(p, 1e-6) if p is params[0] else None for p in params])
    elif change == "load":
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["exp_avg"] = state["exp_avg"] * 100
        optimizer.load_state_dict(saved)
    elif change == "gamma":
        optimizer.param_groups[0]["gamma"] = 100.0
    elif change == "no gradient":
        params[0].grad = None
        params[1].grad *= 100
        optimizer.step()
    else:
        optimizer.param_groups[1]["fused"] = False
        params[1].grad *= 100
        optimizer.step()
    assert fraction(optimizer) != before or change == "curvature"
    assert float(optimizer.stats()["clip_fraction"]) == pytest.approx(fraction(optimizer))
