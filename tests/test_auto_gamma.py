"""`gamma="auto"`: γ is the quantile of |m| / h that clips the target's share of the coordinates, set at refreshes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaG, SophiaH
from sophia.optim import auto_gamma, update
from sophia.optim.checks import CLIP_TARGET
from tests.models import sentences
from tests.regression import parameters_equal, regression, train

SHAPE = (40, 50)


def clipped(m, h, gamma, eps=1e-12):
    return (m.abs() > torch.clamp(gamma * h, min=eps)).double().mean().item()


def drawn(seed=0, spread=2.0, shape=SHAPE):
    """Momentum and curvature over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    m, log_h = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return m, (spread * log_h).exp()


def gamma_for(m, h, target, eps=1e-12):
    return auto_gamma.quantile(auto_gamma.histogram(m, h, eps=eps).tolist(), target)


@pytest.mark.parametrize("target", [0.01, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gamma_clips_the_target(target, dtype):
    m, h = (x.to(dtype) for x in drawn())
    assert clipped(m.double(), h.double(), gamma_for(m, h, target)) == pytest.approx(target, abs=0.003)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e9])
def test_it_is_a_ratio_whatever_the_units(scale):
    m, h = drawn()
    assert gamma_for(m, scale * h, 0.7) == pytest.approx(gamma_for(m, h, 0.7) / scale, rel=0.02)


def test_against_the_quantile_of_torch():
    """Of the plain definition, in float64; a bin is 3 % wide at most."""
    m, h = drawn(1)
    for target in (0.1, 0.5, 0.9):
        exact = torch.quantile((m.abs() / h).flatten(), 1 - target).item()
        assert gamma_for(m, h, target) == pytest.approx(exact, rel=0.03)


def test_negative_curvature_counts_as_clipped():
    """Hutchinson's: a third of the entries is, so γ clips only as much of the others as is left of the target."""
    m, h = drawn()
    h.view(-1)[::3] *= -1
    assert clipped(m, h, gamma_for(m, h, 0.7)) == pytest.approx(0.7, abs=0.005)


def test_momentum_below_eps_is_never_clipped():
    m, h = drawn()
    m.view(-1)[::5] *= 1e-9
    eps = 1e-6
    assert clipped(m, h, gamma_for(m, h, 0.7, eps), eps) == pytest.approx(0.7, abs=0.005)


def test_a_target_out_of_reach_leaves_room_on_both_sides():
    """γ clips between a tenth and nine tenths of those that it decides about."""
    m, h = drawn()
    negative = h.clone()
    negative.view(-1)[: 9 * h.numel() // 10] *= -1
    rest = negative > 0
    assert clipped(m[rest], negative[rest], gamma_for(m, negative, 0.7)) == pytest.approx(0.1, abs=0.02)
    still = m.clone()
    still.view(-1)[: 9 * h.numel() // 10] = 0
    rest = still != 0
    assert clipped(still[rest], h[rest], gamma_for(still, h, 0.7)) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_momentum_that_says_nothing_leaves_gamma(value):
    _, h = drawn()
    assert gamma_for(torch.full(SHAPE, value, dtype=torch.float64), h, 0.7) is None


@pytest.mark.parametrize("shape", [(0, 3), (7, 13), (64, 64)])
def test_slices_cover_tensors_of_any_layout(shape, monkeypatch):
    m, h = drawn(shape=shape)
    expected = auto_gamma.histogram(m, h, eps=1e-12)
    assert expected.sum() == m.numel()
    monkeypatch.setattr(update, "BLOCK", 100)
    assert torch.equal(auto_gamma.histogram(m, h, eps=1e-12), expected)
    assert torch.equal(auto_gamma.histogram(m.t().contiguous().t(), h, eps=1e-12), expected)


def step_with(optimizer, params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_the_next_step_clips_the_target(path):
    """The kernels read γ from the group. With β1 = 0 and one gradient again and again, momentum stands still."""
    m, h = (x.float() for x in drawn())
    p = nn.Parameter(torch.zeros(SHAPE))
    optimizer = Sophia([p], gamma="auto", betas=(0.0, 0.9), lr=1e-9, **path)
    optimizer.update_curvature([h])
    assert optimizer.param_groups[0]["gamma"] == 0.05  # no momentum yet: the paper's
    step_with(optimizer, [p], [m])
    optimizer.update_curvature([h])
    step_with(optimizer, [p], [m])
    assert optimizer.stats()["clip_fraction"] == pytest.approx(CLIP_TARGET, abs=0.005)
    gamma = optimizer.param_groups[0]["gamma"]
    assert isinstance(gamma, float)
    step_with(optimizer, [p], [3 * m])
    assert optimizer.param_groups[0]["gamma"] == gamma  # at refreshes only
    assert optimizer.stats()["clip_fraction"] > CLIP_TARGET + 0.03


def test_groups_of_one_target_have_one_gamma_and_fixed_ones_keep_theirs():
    params = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(4)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "weight_decay": 0.0},
        {"params": params[2:3], "clip_target": 0.3},
        {"params": params[3:], "gamma": 0.4},
    ]
    optimizer = Sophia(groups, gamma="auto", clip_target=0.6, betas=(0.0, 0.9), lr=1e-9)
    momenta, curvature = zip(*((m.float(), h.float()) for m, h in (drawn(seed) for seed in range(4))), strict=True)
    curvature = [h * 10**number for number, h in enumerate(curvature)]
    for _ in range(2):
        optimizer.update_curvature(curvature)
        step_with(optimizer, params, momenta)
    gammas = [group["gamma"] for group in optimizer.param_groups]
    assert [group["clip_target"] for group in optimizer.param_groups] == [0.6, 0.6, 0.3, None]
    assert gammas[0] == gammas[1] not in gammas[2:]
    assert gammas[3] == 0.4
    h = [optimizer.state[p]["hessian"] for p in params]
    both = [torch.cat((a, b)) for a, b in ((momenta[0], momenta[1]), (h[0], h[1]))]
    assert clipped(*both, gammas[0]) == pytest.approx(0.6, abs=0.005)
    assert clipped(momenta[0], h[0], gammas[0]) > 0.65  # not each on its own
    assert clipped(momenta[2], h[2], gammas[2]) == pytest.approx(0.3, abs=0.005)


def test_unknown_curvature_does_not_count_and_a_refused_refresh_changes_nothing():
    params = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(2)]
    optimizer = Sophia(params, gamma="auto", betas=(0.0, 0.9), lr=1e-9)
    (m, h), (other, _) = drawn(0), drawn(1)
    optimizer.update_curvature([h.float(), None])
    with pytest.warns(UserWarning, match="hold still"):
        step_with(optimizer, params, [m, 1e6 * other])
    optimizer.update_curvature([h.float(), None])
    gamma = optimizer.param_groups[0]["gamma"]
    assert clipped(m.float(), optimizer.state[params[0]]["hessian"], gamma) == pytest.approx(0.7, abs=0.005)
    step_with(optimizer, params, [5 * m, other])
    assert not optimizer.update_curvature([torch.full(SHAPE, torch.nan), None])
    assert optimizer.param_groups[0]["gamma"] == gamma


class Tagger(nn.Module):
    """Enough coordinates for a fraction to mean something."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 24), nn.Linear(24, 48), nn.Linear(48, 11)

    def forward(self, tokens):
        return self.head(torch.tanh(self.inner(self.embed(tokens))))


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_it_is_held_in_training(kind, target):
    """Within a few percent over the steps between two refreshes, once there is momentum."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tagger()
    optimizer = kind(model.parameters(), lr=3e-3, gamma="auto", clip_target=target, weight_decay=0.1)
    assert optimizer.param_groups[0]["gamma"] == kind.PAPER["gamma"]
    found = []
    for t in range(80):
        tokens, _ = sentences(rows=64, seed=t)
        labels = (tokens * 3 + 1) % 11

        def loss(tokens=tokens, labels=labels):
            return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

        optimizer.refresh_curvature(loss if kind is SophiaH else lambda tokens=tokens: model(tokens))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        found.append(optimizer.stats()["clip_fraction"].item())
    blocks = torch.tensor(found).view(8, 10)[2:].mean(1)
    assert (blocks - target).abs().max() < 0.08, blocks  # so quickly do gradients shrink here
    assert (blocks.mean() - target).abs() < 0.05, blocks


@pytest.mark.parametrize("bias_correction", [False, True])
def test_a_resume_goes_on_bit_for_bit(bias_correction):
    model, inputs, labels = regression()
    settings = {"gamma": "auto", "clip_target": 0.6, "curvature_interval": 4, "bias_correction": bias_correction}
    optimizer = SophiaG(model.parameters(), lr=1e-2, **settings)
    train(model, optimizer, inputs, labels, 6)
    assert optimizer.param_groups[0]["gamma"] != 0.05
    again = copy.deepcopy(model)
    resumed = SophiaG(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, inputs, labels, 8)
    train(again, resumed, inputs, labels, 8)
    assert parameters_equal(model, again)
    assert resumed.param_groups[0]["gamma"] == optimizer.param_groups[0]["gamma"]
    assert resumed.param_groups[0]["clip_target"] == 0.6


def test_a_state_dict_from_before_it_existed_is_taken_on():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2)
    train(model, optimizer, inputs, labels, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["bias_correction"], group["clip_target"]
    other = SophiaG(model.parameters(), gamma="auto", curvature_interval=2)
    other.load_state_dict(old)
    assert (other.param_groups[0]["gamma"], other.param_groups[0]["clip_target"]) == (0.05, CLIP_TARGET)
    other.param_groups[0]["curvature_interval"] = 2
    train(model, other, inputs, labels, 4)
    assert other.param_groups[0]["gamma"] != 0.05


def test_a_late_group_follows_too():
    first, second = (nn.Parameter(torch.zeros(SHAPE)) for _ in range(2))
    optimizer = SophiaH([first], gamma="auto", clip_target=0.4)
    optimizer.add_param_group({"params": [second]})
    assert [group["clip_target"] for group in optimizer.param_groups] == [0.4, 0.4]
    assert [group["gamma"] for group in optimizer.param_groups] == [0.01, 0.01]
    fixed = SophiaG([first])
    fixed.add_param_group({"params": [second], "gamma": "auto"})
    assert [group["clip_target"] for group in fixed.param_groups] == [None, CLIP_TARGET]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": "best"}, "gamma='best' must be a finite number of at least 0 or 'auto'"),
        ({"gamma": "auto", "clip_target": 0}, "clip_target=0 must be a share"),
        ({"gamma": "auto", "clip_target": 1.0}, "clip_target=1.0 must be a share"),
        ({"gamma": "auto", "clip_target": "most"}, "clip_target='most' must be a share"),
        ({"gamma": "auto", "clip_target": float("nan")}, "clip_target=nan must be a share"),
        ({"clip_target": 0.5}, "clip_target=0.5 has a meaning with gamma='auto' only"),
        ({"gamma": "auto", "capturable": True}, "a CUDA graph freezes γ"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SophiaG([nn.Parameter(torch.zeros(2))], **settings)
    if "gamma" in settings and "capturable" not in settings:
        with pytest.raises(ValueError, match=message):
            SophiaG([{"params": [nn.Parameter(torch.zeros(2))], **settings}])


@pytest.mark.parametrize("kind", [Sophia, SophiaG, SophiaH])
def test_the_papers_rule_has_a_name(kind):
    """Constants of algorithm 3 and section 3; they hold whatever the defaults are."""
    assert kind.PAPER["betas"] == (0.96, 0.99)
    assert kind.PAPER["gamma"] == (0.01 if kind is SophiaH else 0.05)
    assert (kind.PAPER["eps"], kind.PAPER["weight_decay"], kind.PAPER["curvature_interval"]) == (1e-12, 0.2, 10)
    assert kind.PAPER["bias_correction"] is False
    optimizer = kind([nn.Parameter(torch.zeros(2))], lr=1e-3, **kind.PAPER)
    assert optimizer.param_groups[0]["clip_target"] is None
    # What is no part of it decides how and where a step is computed, or from which noise.
    rest = {"lr", "params", "foreach", "fused", "capturable", "maximize", "clip_target"}
    assert optimizer.defaults.keys() <= kind.PAPER.keys() | rest
