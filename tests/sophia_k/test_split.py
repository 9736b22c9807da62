"""A weight that holds several matrices beside each other, as fused queries, keys and values: each is one of its own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaK
from tests.models import assert_same
from tests.sophia_k import drawn
from tests.sophia_k.reference import Fused
from tests.sophia_k.test_rule import TOLERANCE, compare

SHAPES = [(12, 4), (4, 12), (9, 4), (4, 6), (15, 2)]  # parts are square, wide and tall, above and beside each other
PLAIN = {"orthogonalize": 0, "update_rms": None, "nesterov": False}
SETTINGS = [
    {},
    {"basis": "both"},
    {"basis": "both", "rtol": 0.5, **PLAIN},
    {"basis": "none"},
    {"basis": "both", "max_basis_dim": 4, "orthogonalize": 0},
    {"diagonal": "gradients", "basis": "both", "exponent": 0.5, "gamma": 1.0},
    {"factors": "gradients", "basis": "both"},
    {"factors": "gradients", "diagonal": "gradients", "exponent": 0.5, "gamma": 1.0, "basis": "both"},
]


def run(shape, dtype=torch.float64, state_dict_at=None, **settings):
    theta, grads, estimates = drawn.draw(shape, dtype)
    settings = {"lr": 0.05, "betas": (0.9, 0.8), "curvature_interval": drawn.INTERVAL, **settings}
    p = nn.Parameter(theta.clone())
    optimizer = SophiaK([p], split=3, **settings)
    reference = Fused(theta.numpy(), 3, **settings)
    for t, (g, e) in enumerate(zip(grads, estimates, strict=True)):
        if t == state_dict_at:
            heir = SophiaK([p])
            heir.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = heir
        if e is not None:
            assert optimizer.update_curvature([e])
            reference.refresh(e.double().numpy(), drawn.bases(optimizer, p))
        p.grad = g.clone()
        optimizer.step()
        reference.step(g.double().numpy(), drawn.bases(optimizer, p))
    return p, optimizer, reference


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_parts_agree_with_the_reference(settings, shape, dtype):
    p, optimizer, reference = run(shape, dtype, **settings)
    compare(p, reference.joined("theta"), dtype, "θ")
    own = optimizer.state[p]
    compare(own.get("hessian", own.get("exp_avg_sq")), reference.joined("squares"), dtype, "D")
    names = {"step", "refreshes", "exp_avg", "hessian" if "hessian" in own else "exp_avg_sq"}
    for side, name in enumerate(("row", "column")):
        if not reference.parts[0].turns[side]:
            continue
        names |= {f"{name}_statistics", f"{name}_basis"}
        shared = side != reference.dim
        for key, theirs in (("statistics", "statistics"), ("basis", "bases")):
            expected = np.stack([getattr(part, theirs)[side] for part in reference.parts])
            expected = expected[0] if shared else expected  # one for all
            found = own[f"{name}_{key}"]
            assert found.shape == expected.shape
            compare(
                found.abs() if key == "basis" else found, np.abs(expected) if key == "basis" else expected, dtype, key
            )
    assert own.keys() == names


@pytest.mark.parametrize(
    "settings", [{}, {"basis": "none"}, {"factors": "gradients", "diagonal": "gradients"}], ids=str
)
def test_it_is_three_parameters(settings):
    """Where no side is in common: bases of rows alone, or none."""
    theta, grads, estimates = drawn.draw((12, 5))
    fused, apart = nn.Parameter(theta.clone()), [nn.Parameter(part.clone()) for part in theta.chunk(3)]
    shared = {"lr": 0.05, "curvature_interval": 5, **settings}
    one, three = SophiaK([fused], split=3, **shared), SophiaK(apart, **shared)
    for g, e in zip(grads, estimates, strict=True):
        if e is not None:
            one.update_curvature([e])
            three.update_curvature([*e.chunk(3, dim=1)])
        fused.grad = g.clone()
        for p, part in zip(apart, g.chunk(3), strict=True):
            p.grad = part.clone()
        one.step()
        three.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in apart]), rtol=1e-11, atol=1e-11)
    for name in ("clip_fraction", "momentum_norm", "curvature_norm"):
        torch.testing.assert_close(one.stats()[name], three.stats()[name])


def test_parts_have_lengths_of_their_own():
    """One whose gradients are small moves as far as the others; in one piece it would not."""
    moved = []
    for split in (1, 3):
        p = nn.Parameter(torch.zeros(12, 4))
        optimizer = SophiaK(
            [p], lr=1.0, split=split, diagonal="gradients", basis="none", clip=False, exponent=0.0, update_rms=0.2
        )
        p.grad = torch.randn(12, 4, generator=drawn.generator(0))
        p.grad[:4] *= 1e-3
        optimizer.step()
        moved.append([float(part.detach().square().mean().sqrt()) for part in p.chunk(3)])
    assert moved[1] == pytest.approx([0.2] * 3, rel=1e-5)
    assert moved[0][0] < 0.1 < moved[0][1]


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)], ids=str)
@pytest.mark.parametrize("settings", [{"basis": "both"}, SETTINGS[-1]], ids=str)
def test_a_state_dict_goes_on_bit_for_bit(settings, shape):
    """The number of parts is in it."""
    (one, first, _), (two, second, _) = (run(shape, state_dict_at=at, **settings) for at in (None, 5))
    assert torch.equal(one, two)
    assert second.param_groups[0]["split"] == 3
    assert_same(first.state[one].values(), [second.state[two][name] for name in first.state[one]])


def test_another_number_of_parts_is_another_state():
    p, optimizer, _ = run((12, 4), basis="both")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["split"] = 2
    with pytest.raises(ValueError, match=r"row_statistics of parameter 0 in the state dict has shape \(3, 4, 4\)"):
        SophiaK([p]).load_state_dict(saved)


# ---- settings and groups


@pytest.mark.parametrize("wrong", [0, -3, 1.5, True, None, "3"])
def test_a_number_of_parts_that_is_none(wrong):
    with pytest.raises(ValueError, match=r"split=.* must be a whole number of at least 1"):
        SophiaK([nn.Parameter(torch.zeros(12, 4))], split=wrong)


def test_a_weight_that_is_not_so_many_matrices():
    vector, fused = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(12, 4))
    SophiaK([vector, fused], split=3)
    with pytest.raises(ValueError, match=r"split=3: parameter 2 of shape \(4, 4\) is not so many matrices"):
        SophiaK([vector, fused, nn.Parameter(torch.zeros(4, 4))], split=3)


@pytest.mark.parametrize(
    ("others", "message"),
    [({"hidden": False}, "hidden=False"), ({"basis": "none", **PLAIN}, "take every entry on its own")],
    ids=str,
)
def test_parts_without_effect(others, message):
    with pytest.raises(ValueError, match=f"split=3 has no effect: .*{message}"):
        SophiaK([nn.Parameter(torch.zeros(12, 4))], split=3, **others)


class Attention(nn.Module):
    """torch's own layer, and a fused weight the other way round."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.own = nn.MultiheadAttention(4, 2, batch_first=True)
        self.c_attn = nn.Linear(12, 4)  # its weight is [4, 12]
        self.mlp = nn.Linear(4, 12)

    def forward(self, tokens):
        x = self.tokens(tokens)
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.head(x + self.c_attn(torch.tanh(self.mlp(x))))


def cut(model, **settings):
    """Names by the number of parts, of hidden matrices."""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for group in SophiaK.groups(model, **settings):
        if group["hidden"]:
            found[group.get("split", 1)] = {names[p] for p in group["params"]}
    return found


def test_groups_by_pattern_and_by_name():
    model = Attention()
    rest = {"own.out_proj.weight", "mlp.weight"}
    fused = {"own.in_proj_weight", "c_attn.weight"}
    assert cut(model) == {1: rest | fused}
    assert cut(model, split="auto") == {1: rest, 3: fused}
    assert cut(model, split={"own.in_*": 3}) == {1: rest | {"c_attn.weight"}, 3: {"own.in_proj_weight"}}
    assert cut(model, split={"own.in_*": 3, "mlp.*": 2})[2] == {"mlp.weight"}
    assert cut(model, split="auto", exclude=["c_attn.*"])[3] == {"own.in_proj_weight"}
    with pytest.raises(ValueError, match=r"split: 'tokens\.\*' matches no hidden matrix"):
        SophiaK.groups(model, split={"tokens.*": 3})
    with pytest.raises(ValueError, match=r"split=3 must be 'auto', None or a dict"):
        SophiaK.groups(model, split=3)
    with pytest.raises(ValueError, match="split='auto' found no fused"):
        SophiaK.groups(nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 4)), split="auto")


def test_a_model_trains_with_fused_weights():
    model = Attention()
    optimizer = SophiaK(SophiaK.groups(model, split="auto"), lr=0.02, basis="both", curvature_interval=2).attach(model)
    tokens = torch.randint(0, 11, (16, 6), generator=drawn.generator(1))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3
    assert optimizer.state[model.own.in_proj_weight]["row_basis"].shape == (3, 4, 4)
    assert optimizer.state[model.own.in_proj_weight]["column_basis"].shape == (4, 4)
