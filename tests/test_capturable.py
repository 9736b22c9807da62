"""`capturable=True`: time on the device, and the step inside a CUDA graph; and GradScaler with a fused step.

Without a CUDA device Triton's interpreter runs all but the graphs (`test_interpreted.py`).
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaG
from tests.interpreter import DEVICE, needs_cuda, runs_kernels
from tests.models import Classifier, assert_same, examples, seeded
from tests.test_amp import Syncs

INTERVAL = 3


def build(**settings):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in ((40, 30), (7,), (0, 2))]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    return params, Sophia(groups, **{"lr": 0.05, "curvature_interval": INTERVAL, **settings})


def gradients(params, t):
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(p.shape, generator=generator).to(DEVICE) for p in params]


def refresh(params, optimizer, t):
    assert optimizer.update_curvature([300 * g.square() for g in gradients(params, 1000 + t)])


def everything(params, optimizer):
    names = ("step", "exp_avg", "hessian")
    return [
        *(p.detach() for p in params),
        *(optimizer.state[p][name].cpu() for p in params for name in names if optimizer.state[p]),
    ]


@runs_kernels
@pytest.mark.parametrize(
    "settings", [{}, {"foreach": True}, {"state_dtype": torch.bfloat16}, {"bias_correction": True}], ids=str
)
def test_time_on_the_device_is_the_same_time(settings):
    path = {} if settings.get("foreach") else {"fused": True}
    (params, optimizer), (others, plain) = build(**settings, **path, capturable=True), build(**settings, **path)
    due = []
    for t in range(2 * INTERVAL + 2):
        due.append(optimizer.curvature_due)
        assert plain.curvature_due == due[-1]
        for own, one in ((params, optimizer), (others, plain)):
            if due[-1]:
                refresh(own, one, t)
            for p, g in zip(own, gradients(own, t), strict=True):
                p.grad = g
            one.step()
    assert [t for t, d in enumerate(due) if d] == [0, INTERVAL, 2 * INTERVAL]
    assert_same(everything(params, optimizer), everything(others, plain))
    clocks = [group["clock"] for group in optimizer.param_groups]
    assert clocks[0] is clocks[1]
    assert clocks[0].device.type == DEVICE
    assert clocks[0] == plain.param_groups[0]["clock"] == 2 * INTERVAL + 2
    assert {optimizer.state[p]["step"].device.type for p in params} == {DEVICE}
    assert optimizer.stats()["curvature_age"] == 2


@runs_kernels
def test_a_capturable_step_waits_for_nothing():
    params, optimizer = build(fused=True, capturable=True, lr=torch.tensor(0.05, device=DEVICE))
    refresh(params, optimizer, 0)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    optimizer.step()
    with Syncs() as syncs:
        optimizer.step()
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        optimizer.step()
        optimizer.stats()
    assert syncs.found == []
    with Syncs() as syncs:
        assert optimizer.curvature_due
    assert syncs.found  # it says so in its docstring


@runs_kernels
def test_a_state_dict_holds_a_number_and_fits_either_kind():
    for kind, other_kind in ((True, False), (False, True), (True, True)):
        params, optimizer = build(fused=True, capturable=kind)
        refresh(params, optimizer, 0)
        for t in range(4):
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        assert [group["clock"] for group in saved["param_groups"]] == [4, 4]
        others, other = build(fused=True, capturable=other_kind)
        other.load_state_dict(saved)
        assert other.param_groups[0]["capturable"] is other_kind  # how a step is computed is not part of the state
        assert other.curvature_due
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q.data)
        for own, one in ((params, optimizer), (others, other)):
            refresh(own, one, 4)
            for p, g in zip(own, gradients(own, 4), strict=True):
                p.grad = g
            one.step()
        assert_same(everything(params, optimizer), everything(others, other))
        assert isinstance(other.param_groups[1]["clock"], torch.Tensor) is other_kind


@runs_kernels
@pytest.mark.parametrize("capturable", [False, True])
def test_gradscaler_leaves_overflow_to_the_step(capturable):
    model = seeded(lambda: Classifier(dropout=0)).to(DEVICE)
    optimizer = SophiaG(model.parameters(), lr=2e-2, curvature_interval=INTERVAL, fused=True, capturable=capturable)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**26)
    x, y = (t.to(DEVICE) for t in examples())
    losses, withheld = [], 0
    for _ in range(30):
        with torch.autocast(DEVICE, torch.float16):
            optimizer.refresh_curvature(lambda: model(x))
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        before, scale = [p.detach().clone() for p in model.parameters()], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            withheld += 1
            assert_same([p.detach() for p in model.parameters()], before)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert withheld > 0
    group = optimizer.state_dict()["param_groups"][0]
    assert group["clock"] == 30 - withheld
    assert group["accepted_refreshes"] == -(-(30 - withheld) // INTERVAL)
    assert {int(state["step"]) for state in optimizer.state.values()} == {30 - withheld}
    assert losses[-1] < 0.7 * losses[0]


def test_gradscaler_withholds_where_nobody_asked_for_a_fused_step():
    params = [nn.Parameter(torch.zeros(3, device=DEVICE))]
    assert not Sophia(params)._step_supports_amp_scaling


# ---- CUDA graphs


def warm_up(params, optimizer, steps):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(steps):
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work):
    graph, other = torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        other.add_(1)  # of an empty graph torch warns, also where work raises
        work()
    return graph


@needs_cuda
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_replays_are_steps(state_dtype, settings):
    """Gradients, learning rate and found_inf change between replays, and the curvature is refreshed there."""
    lr = torch.tensor(0.05, device=DEVICE)
    params, optimizer = build(**settings, capturable=True, lr=lr, state_dtype=state_dtype)
    others, plain = build(**settings, lr=lr.clone(), state_dtype=state_dtype)
    for own, one in ((params, optimizer), (others, plain)):
        refresh(own, one, 0)
        warm_up(own, one, 3)
    place = [torch.empty_like(p) for p in params]  # not where the gradients of the warm-up were
    for p, g in zip(params, place, strict=True):
        p.grad = g
    found_inf = torch.zeros((), device=DEVICE)
    optimizer.found_inf = plain.found_inf = found_inf
    graph = capture(optimizer.step)
    for t in range(3, 12):
        found_inf.fill_(float(t in (5, 9)))
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"].fill_(0.05 / t)
        if optimizer.curvature_due:
            assert plain.curvature_due
            refresh(params, optimizer, t)
            refresh(others, plain, t)
        for p, q, g, own in zip(params, others, gradients(params, t), place, strict=True):
            own.copy_(g)
            q.grad = g
            assert p.grad is own
        graph.replay()
        plain.step()
    assert_same(everything(params, optimizer), everything(others, plain))
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 10


@needs_cuda
def test_eager_steps_and_replays_mix():
    params, optimizer = build(fused=True, capturable=True)
    others, plain = build(fused=True)
    for own, one in ((params, optimizer), (others, plain)):
        refresh(own, one, 0)
        warm_up(own, one, 3)
    for p, q, g in zip(params, others, gradients(params, 7), strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    graph = capture(optimizer.step)
    optimizer.step()  # before the first replay: the graph's tables are not filled yet
    for _ in range(3):
        graph.replay()
        optimizer.step()
    for _ in range(7):
        plain.step()
    assert_same(everything(params, optimizer), everything(others, plain))


@needs_cuda
@pytest.mark.parametrize(
    ("settings", "prepare", "message"),
    [
        ({}, True, "capturable=True"),
        ({"capturable": True}, False, "side stream before the capture"),
        ({"capturable": True, "lr": torch.tensor(0.1)}, True, "put it on the parameters' device"),
    ],
    ids=["not capturable", "not warmed up", "learning rate in main memory"],
)
def test_a_capture_that_would_freeze_something_is_refused(settings, prepare, message):
    params, optimizer = build(**settings)
    refresh(params, optimizer, 0)
    if prepare:
        warm_up(params, optimizer, 1)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    with pytest.raises(RuntimeError, match=message):
        capture(optimizer.step)


@needs_cuda
def test_time_is_not_read_inside_a_capture():
    params, optimizer = build(capturable=True)
    refresh(params, optimizer, 0)
    warm_up(params, optimizer, 3)
    with pytest.raises(RuntimeError, match="between replays"):
        capture(lambda: optimizer.curvature_due)
