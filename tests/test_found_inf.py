"""`found_inf`: a step that overflowed is none, on every path, whether the host or the device decides it.

In Triton's interpreter (`test_interpreted.py`) CPU tensors play the device: nothing may look into them.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from sophia import Sophia
from sophia.optim import kernels
from tests.interpreter import DEVICE, INTERPRETED
from tests.models import assert_same
from tests.test_amp import Syncs

PATHS = [
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
    {"fused": True, "capturable": True},
    {"foreach": True, "capturable": True},
]
SKIPPED = {0, 4, 5, 9, 10, 17}
STEPS, INTERVAL = 24, 3


def possible(settings):
    """Skip where the path cannot run."""
    if settings.get("capturable") and DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("capturable=True needs a CUDA device, or Triton's interpreter in its place")
    if settings.get("fused") and (problem := kernels.problem(DEVICE)):
        pytest.skip(problem)


def gradients(t):
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((30, 5), (7,), (3,))]


def estimates(t):
    return [300 * g.square() for g in gradients(1000 + t)]


def build(**settings):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in ((30, 5), (7,), (3,))]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    return params, Sophia(groups, lr=0.05, curvature_interval=INTERVAL, state_dtype=torch.bfloat16, **settings)


def advance(params, optimizer, t, found=None):
    """A step of number t; found says whether its gradients overflowed (None: nobody looked)."""
    for p, g in zip(params, gradients(t), strict=True):
        p.grad = torch.full_like(g, torch.nan) if found else g
    if found is None:
        optimizer.step()
        return
    optimizer.found_inf = torch.tensor(float(found), device=DEVICE)
    optimizer.step()
    del optimizer.found_inf


def state_of(params, optimizer):
    optimizer.state_dict()  # settles the clock
    return [
        *(p.detach() for p in params),
        *(optimizer.state[p][name].cpu() for p in params for name in ("step", "exp_avg", "hessian")),
        int(optimizer.param_groups[0]["clock"]),
        int(optimizer.param_groups[1]["last_refresh"]),
    ]


@pytest.mark.parametrize("settings", PATHS, ids=str)
def test_a_run_with_skipped_steps_is_the_run_without_them(settings):
    """Parameters, state, the phase of the refreshes and the noise of bfloat16 state, bit for bit."""
    possible(settings)
    params, optimizer = build(**settings)
    others, plain = build(**settings)
    taken = 0
    for call in range(STEPS):
        if optimizer.curvature_due:
            assert optimizer.update_curvature(estimates(taken))
        if call in SKIPPED:
            advance(params, optimizer, taken, found=True)
            continue
        if plain.curvature_due:
            assert plain.update_curvature(estimates(taken))
        advance(params, optimizer, taken, found=False)
        advance(others, plain, taken, found=False)
        taken += 1
        if call in (8, 16):  # also when nobody has asked for the time between
            assert_same(state_of(params, optimizer), state_of(others, plain))
    assert_same(state_of(params, optimizer), state_of(others, plain))
    assert plain.param_groups[0]["clock"] == taken == STEPS - len(SKIPPED)


@pytest.mark.parametrize("settings", PATHS, ids=str)
def test_parameters_that_hold_still_skip_too(settings):
    possible(settings)
    params, optimizer = build(**settings)
    assert not optimizer.update_curvature([torch.full_like(p, torch.inf) for p in params])
    advance(params, optimizer, 0, found=False)
    before = state_of(params, optimizer)
    advance(params, optimizer, 1, found=True)
    assert_same(state_of(params, optimizer), before)
    assert optimizer.state[params[0]]["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("settings", PATHS, ids=str)
def test_scaled_gradients_are_divided_on_every_path(settings):
    possible(settings)
    (params, optimizer), (others, plain) = build(**settings), build(**settings)
    for one in (optimizer, plain):
        assert one.update_curvature(estimates(0))
    advance(others, plain, 0, found=False)
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g * 2.0**15
    optimizer.grad_scale = torch.tensor([2.0**15], device=DEVICE)
    optimizer.found_inf = torch.tensor([0.0], device=DEVICE)
    optimizer.step()
    assert_same(state_of(params, optimizer), state_of(others, plain))


@pytest.mark.parametrize("settings", [settings for settings in PATHS if "capturable" not in settings], ids=str)
def test_the_host_looks_once_in_an_interval_and_once_for_a_skip(settings):
    possible(settings)
    params, optimizer = build(**settings)
    optimizer.update_curvature(estimates(0))
    reads, reading = [], DEVICE == "cuda" or INTERPRETED
    for call in range(STEPS):
        with Syncs() as syncs:
            due = optimizer.curvature_due
            advance(params, optimizer, call, found=call in SKIPPED)
        reads.append(len(syncs.found))
        if due:
            optimizer.update_curvature(estimates(call))
    if reading:
        most = (STEPS - len(SKIPPED)) // INTERVAL + len(SKIPPED)
        assert 0 < sum(reads) <= most
        assert reads[:INTERVAL] == [0] * INTERVAL
    optimizer.state_dict()
    assert optimizer.param_groups[0]["clock"] == STEPS - len(SKIPPED)


@pytest.mark.parametrize("settings", PATHS, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_knows_the_time(way, settings):
    """Taken while the host does not know how many steps were skipped."""
    possible(settings)
    params, optimizer = build(**settings)
    optimizer.update_curvature(estimates(0))
    for call in range(5):
        advance(params, optimizer, call, found=call in SKIPPED)
    if way == "state_dict":
        saved = optimizer.state_dict()
        assert [group["clock"] for group in saved["param_groups"]] == [3, 3]
        others, other = build(**settings)
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(copy.deepcopy(saved))
    elif way == "deepcopy":
        others, other = copy.deepcopy((params, optimizer))
    else:
        others, other = pickle.loads(pickle.dumps((params, optimizer)))
    assert other.curvature_due == optimizer.curvature_due
    for call in range(5, 12):
        for own, one in ((params, optimizer), (others, other)):
            if one.curvature_due:
                one.update_curvature(estimates(call))
            advance(own, one, call, found=call in SKIPPED)
    assert_same(state_of(params, optimizer), state_of(others, other))
    clocks = [group["clock"] for group in other.param_groups]
    assert clocks[0] is clocks[1]


def test_the_age_is_told_without_waiting():
    params, optimizer = build(foreach=True)
    optimizer.update_curvature(estimates(0))
    for call in range(4):
        advance(params, optimizer, call, found=call == 2)
    with Syncs() as syncs:
        age = optimizer.stats()["curvature_age"]
    assert syncs.found == []
    assert age == 3
