"""The trainer's optimizers: Lion against its formula, parameter groups by name, one face for all."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sophia import SophiaG, SophiaK
from sophia import optimizers as optimizers_module
from sophia.config import OPTIMIZERS, OptimizerSettings
from sophia.curvature import GaussNewtonBartlett
from sophia.model import GPT, GPTConfig
from sophia.optim import kernels
from sophia.optim.lion import Lion
from sophia.optimizers import CurvatureBatch, Optimizers
from sophia.parameter_groups import parameter_groups

SHAPE = GPTConfig(vocab_size=11, context=6, layers=2, heads=2, width=8, bias=True)
RECIPE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def build(name="adamw", **settings):
    model = GPT(SHAPE, torch.Generator().manual_seed(0))
    sophia = {"gamma": 0.1, "curvature_rows": 2, "curvature_chunks": 2} if name in ("sophia-g", "sophia-k") else {}
    sophia = {"gamma": 0.1, "curvature_rows": 2} if name == "sophia-h" else sophia
    chosen = OptimizerSettings(**{"optimizer": name, **RECIPE, **sophia, **settings})
    return model, Optimizers(chosen, model, seed=3)


def batch():
    return torch.randint(0, 11, (2, 4, 6), generator=torch.Generator().manual_seed(1))


def test_lion_follows_algorithm_2():
    """Against the paper's lines in float64, one coordinate at a time."""
    lr, beta1, beta2, decay = 0.05, 0.9, 0.97, 0.3
    theta = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    p = theta.clone().requires_grad_()
    optimizer = Lion([p], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    m = [0.0] * 4
    for step in range(20):
        gradient = [(-1) ** step * 0.3 * (index - 1) + 0.01 * step for index in range(4)]
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for index, g in enumerate(gradient):
            c = beta1 * m[index] + (1 - beta1) * g
            sign = (c > 0) - (c < 0)
            theta[index] -= lr * (sign + decay * theta[index])
            m[index] = beta2 * m[index] + (1 - beta2) * g
        torch.testing.assert_close(p.detach(), theta, rtol=1e-12, atol=1e-12)


def test_lion_skips_what_has_no_gradient_and_runs_a_closure():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Lion([a, b], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = a.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert a.tolist() == pytest.approx([0.9, 0.9])
    assert b.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_lion_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lion([torch.ones(1, requires_grad=True)], **wrong)


def test_matrices_decay_and_vectors_do_not():
    model, _ = build()
    groups = parameter_groups(OptimizerSettings(**RECIPE), list(model.named_parameters()))
    by_decay = {group["weight_decay"]: {name for name, _ in group["params"]} for group in groups}
    assert by_decay[0.1] == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert by_decay[0.0] == {name for name, p in model.named_parameters() if p.ndim == 1}


def test_exceptions_by_name_first_match_wins():
    model, _ = build()
    chosen = OptimizerSettings(**RECIPE, decay_by_name=("*.0.*norm*=0.5", "*norm*=0.25", "tokens.*=0"))
    decay = {
        name: group["weight_decay"]
        for group in parameter_groups(chosen, list(model.named_parameters()))
        for name, _ in group["params"]
    }
    assert decay["blocks.0.attention_norm.weight"] == 0.5
    assert decay["blocks.1.attention_norm.weight"] == decay["final_norm.bias"] == 0.25
    assert decay["tokens.weight"] == 0.0
    assert decay["positions.weight"] == 0.1


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("embedding.*=0",), "embedding.* matches no parameter"),
        (("*norm*=0", "final_norm*=1"), "final_norm\\* matches no parameter that an earlier pattern left"),
        (("tokens.weight",), "is not PATTERN=DECAY"),
        (("tokens.*=none",), "is not PATTERN=DECAY"),
        (("tokens.*=-1",), "is not PATTERN=DECAY"),
        (("=1",), "is not PATTERN=DECAY"),
    ],
)
def test_an_exception_that_does_nothing_is_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        build(decay_by_name=patterns)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_by_name(name):
    """Relative to the one that is logged, at every point of the schedule; first match wins."""
    model, optimizers = build(name, lr_by_name=("tokens.*=0.5", "*norm*=4", "blocks.1.*=2"), decay_by_name=("*=0.3",))
    names = {p: name for name, p in model.named_parameters()}
    for factor in (1.0, 0.25):
        assert optimizers.set_lr(factor) == RECIPE["lr"] * factor
        found = {
            names[p]: group["lr"] / (RECIPE["lr"] * factor)
            for part in optimizers.parts
            for group in part.param_groups
            for p in group["params"]
        }
        assert found.keys() == set(names.values())
        for parameter, ratio in found.items():
            own = {"tokens": 0.5, "norm": 4, "blocks.1": 2}
            assert ratio == pytest.approx(next((own[key] for key in own if key in parameter), 1.0)), parameter


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("embedding.*=2",), "lr_by_name: embedding.* matches no parameter"),
        (("*norm*=2", "final_norm*=1"), "final_norm\\* matches no parameter that an earlier pattern left"),
        (("tokens.weight",), "lr_by_name: 'tokens.weight' is not PATTERN=FACTOR"),
        (("tokens.*=fast",), "is not PATTERN=FACTOR"),
        (("tokens.*=0",), "is not PATTERN=FACTOR with a factor above 0"),
        (("tokens.*=nan",), "is not PATTERN=FACTOR"),
        (("tokens.*=inf",), "is not PATTERN=FACTOR"),
        (("=1",), "is not PATTERN=FACTOR"),
    ],
)
def test_a_factor_that_does_nothing_is_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        build(lr_by_name=patterns)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model, optimizers = build("muon")
    muon, adamw = optimizers.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {p: name for name, p in model.named_parameters()}
    matrices = {names[p] for group in muon.param_groups for p in group["params"]}
    others = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert matrices == {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    assert matrices | others == set(names.values())
    assert not matrices & others


MATRIX = {
    **{"basis": "both", "factors": "gradients", "diagonal": "gradients", "exponent": 1.0, "clip": False},
    **{"orthogonalize": 2, "update_rms": 0.4, "nesterov": False, "others": "curvature", "nu": 0.3},
}


def test_sophia_k_turns_the_blocks_matrices_and_leaves_the_rest_to_adamw():
    model, optimizers = build("sophia-k", beta1=0.8, beta2=0.97, eps=1e-9, decay_by_name=("blocks.1.*=0.5",))
    (sophia,) = optimizers.parts
    assert isinstance(sophia, SophiaK)
    found = {p: group for group in sophia.param_groups for p in group["params"]}
    assert found.keys() == set(model.parameters())
    for name, p in model.named_parameters():
        group, hidden = found[p], p.ndim == 2 and name.startswith("blocks.")
        assert group["hidden"] is hidden, name
        assert group["betas"] == ((0.8, 0.97) if hidden else (0.9, 0.98)), name
        assert (group["gamma"], group["eps"], group["lr"]) == (0.1, 1e-9, 1e-2)
        assert group["weight_decay"] == (0.5 if name.startswith("blocks.1.") else 0.1 if p.ndim == 2 else 0.0), name
        assert {name: group[name] for name in MATRIX} == {name: sophia.defaults[name] for name in MATRIX}


@pytest.mark.parametrize(("name", "value"), MATRIX.items())
def test_settings_of_sophia_k_reach_it(name, value):
    _, optimizers = build("sophia-k", **{name: value})
    assert {group[name] for group in optimizers.parts[0].param_groups} == {value}
    assert value != SophiaK([torch.ones(1, requires_grad=True)]).defaults[name]


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, None), ("fp32", None), ("bf16", "bfloat16"), ("auto", "auto")], ids=str
)
def test_the_dtype_of_products_reaches_sophia_k(chosen, expected):
    _, optimizers = build("sophia-k", product_dtype=chosen)
    assert {group["product_dtype"] for group in optimizers.parts[0].param_groups} == {expected}


def test_queries_keys_and_values_may_be_three_matrices():
    model, optimizers = build("sophia-k", split_qkv=True, decay_by_name=("blocks.1.*=0.5",))
    (sophia,) = optimizers.parts
    found = {p: group for group in sophia.param_groups for p in group["params"]}
    assert found.keys() == set(model.parameters())
    for name, p in model.named_parameters():
        assert found[p]["split"] == (3 if name.endswith("queries_keys_values.weight") else 1), name
        assert found[p]["weight_decay"] == (0.5 if name.startswith("blocks.1.") else 0.1 if p.ndim == 2 else 0.0), name
    assert {group["split"] for group in build("sophia-k")[1].parts[0].param_groups} == {1}


@pytest.mark.parametrize(
    ("settings", "estimates"),
    [
        ({}, True),
        ({"factors": "gradients"}, True),
        ({"diagonal": "gradients"}, True),
        ({"factors": "gradients", "diagonal": "gradients"}, False),
        ({"basis": "none", "diagonal": "gradients"}, False),
        ({"basis": "none", "diagonal": "gradients", "others": "curvature"}, True),
    ],
)
def test_sophia_k_may_do_without_curvature(settings, estimates):
    _, optimizers = build("sophia-k", **settings)
    assert optimizers.curvature_due is estimates
    assert optimizers.refreshes == (0 if estimates else None)


def test_no_update_rms_is_nought():
    assert build("sophia-k", update_rms=0.0)[1].parts[0].defaults["update_rms"] is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_lowers_the_loss_and_takes_the_schedule(name):
    model, optimizers = build(name)
    inputs, targets = batch()

    def loss():
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    before = loss().item()
    for step in range(12):
        assert optimizers.set_lr(0.5) == pytest.approx(5e-3)
        assert {group["lr"] for part in optimizers.parts for group in part.param_groups} == {5e-3}
        if optimizers.curvature_due:
            optimizers.refresh(
                model,
                CurvatureBatch(
                    inputs=inputs, targets=targets, rows=range(4), chunks=[0, 1, 0, 1], passes=2, mean_rows=2
                ),
            )
            assert step % 10 == 0
        assert not optimizers.curvature_due
        optimizers.zero_grad()
        loss().backward()
        optimizers.step()
    assert loss().item() < before - 0.05
    assert (optimizers.clip_fraction() is not None) is name.startswith("sophia")


def _trained(name, skips, *, far=True, monkeypatch):
    """Parameters and state after a step for each of `skips`; None calls step() without a flag."""
    monkeypatch.setattr(optimizers_module, "_READ_AT_ONCE", frozenset() if far else frozenset({"cpu"}))
    monkeypatch.setattr(kernels, "readable", lambda tensor: not far)
    model, optimizers = build(name)
    inputs, targets = batch()
    for skip in skips:
        if optimizers.curvature_due:
            chunks = CurvatureBatch(
                inputs=inputs, targets=targets, rows=range(4), chunks=[0, 1, 0, 1], passes=2, mean_rows=2
            )
            optimizers.refresh(model, chunks)
        optimizers.set_lr(0.5)
        optimizers.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        if skip:
            next(model.parameters()).grad[0] = torch.nan
            next(model.parameters()).grad[1] = torch.inf
        optimizers.step() if skip is None else optimizers.step(skip=torch.tensor(float(skip)))
    tensors = [p.detach() for p in model.parameters()]
    for part in optimizers.parts:
        tensors += [value for p in model.parameters() if p in part.state for value in part.state[p].values()]
    return tensors, any(hasattr(part, "found_inf") for part in optimizers.parts)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("far", [True, False], ids=["on a GPU", "on the CPU"])
def test_a_flag_leaves_out_an_update_as_if_it_had_not_been(name, far, monkeypatch):
    """Also the first one, and bit for bit; and where it is not raised, nothing is different."""
    if name.startswith("sophia") and far:  # the learning rate is a tensor then, and rounded elsewhere
        plain, _ = _trained(name, [0] * 3, monkeypatch=monkeypatch)
    else:
        plain, _ = _trained(name, [None] * 3, monkeypatch=monkeypatch)
    flagged, left = _trained(name, [1, 0, 1, 0, 0, 1, 1], far=far, monkeypatch=monkeypatch)
    assert not left
    assert len(flagged) == len(plain)
    for ours, theirs in zip(flagged, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("noise", [None, "signs", "labels"])
def test_matrices_get_the_gradients_of_chunks(noise):
    """The trainer's estimate is the library's, of the same rows in the same chunks; with random signs by default."""
    model, optimizers = build("sophia-k", curvature_noise=noise)
    other = copy.deepcopy(model)
    inputs, targets = batch()
    rows = [40, 41, 42, 43]
    optimizers.refresh(
        model,
        CurvatureBatch(inputs=inputs, targets=targets, rows=rows, chunks=[0, 1, 1, 0], passes=2, mean_rows=2),
    )
    named = list(other.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
    others = [p for _, p in named if not any(p is one for one in hidden)]
    expected = SophiaK(
        [{"params": hidden}, {"params": others, "hidden": False}],
        **{"betas": (0.9, 0.95), "seed": 3, "estimator": GaussNewtonBartlett(noise=noise or "signs")},
    )
    expected.refresh_curvature(
        [lambda kept=kept: other(inputs[kept]) for kept in ([0, 3], [1, 2])], rows=[40, 43, 41, 42]
    )
    for ours, (name, theirs) in zip(model.parameters(), named, strict=True):
        found, wanted = optimizers.parts[0].state[ours], expected.state[theirs]
        assert found.keys() == wanted.keys()
        assert ("hessian" in found) is (theirs.ndim == 2 and name.startswith("blocks."))
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=f"{name}: {key}")


def test_chunks_are_squared_apart_and_a_row_that_does_not_count_changes_nothing():
    """The estimate by the plain formula: (1 / N) Σ_c s_c², from gradients of the sampled labels' summed loss."""
    model, optimizers = build("sophia-g")
    other = copy.deepcopy(model)
    inputs, targets = batch()
    chunks = [0, 1, 1, 0]
    rows = [40, 41, 42, 43]
    optimizers.refresh(
        model,
        CurvatureBatch(inputs=inputs, targets=targets, rows=rows, chunks=chunks, passes=2, mean_rows=2),
    )
    expected = SophiaG(other.parameters(), betas=(0.9, 0.95), seed=3, estimator=GaussNewtonBartlett())
    expected.refresh_curvature(
        [lambda kept=kept: other(inputs[kept]) for kept in ([0, 3], [1, 2])], rows=[40, 43, 41, 42]
    )
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            optimizers.parts[0].state[ours]["hessian"], expected.state[theirs]["hessian"], rtol=0, atol=0
        )
