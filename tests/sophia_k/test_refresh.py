"""Refreshes: from a model's sampled gradients to factors, bases and diagonals; how often, and what they leave alone."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaK
from sophia.curvature import GaussNewtonBartlett, deferred_logits
from tests.models import Snapshot, assert_same
from tests.sophia_k import drawn, nets
from tests.sophia_k.reference import Parameter
from tests.sophia_k.test_rule import compare, compare_state

SETTINGS = {"lr": 0.05, "betas": (0.9, 0.7), "curvature_interval": 2}
GRADIENTS = {"factors": "gradients", "diagonal": "gradients", "others": "gradients"}


# ---- what is measured


@pytest.mark.parametrize("kind", ["signs", "labels"])
@pytest.mark.parametrize("settings", [{"basis": "both"}, {"others": "curvature"}, {"diagonal": "gradients"}], ids=str)
def test_refreshes_are_those_of_autograd_by_hand(settings, kind):
    """Three of them, from several forwards with masks of unequal counts, and steps between: parameters and state."""
    model = nets.build()
    estimator = None if kind == "signs" else GaussNewtonBartlett(noise=kind)
    optimizer = SophiaK(nets.groups(model), seed=4, estimator=estimator, **SETTINGS, **settings)
    params = nets.parameters(optimizer)
    references = [
        Parameter(p.detach().numpy(), hidden=p is not model.head.weight, **SETTINGS, **settings) for p in params
    ]
    for step in range(5):
        x, y = nets.batch(step)
        mask = torch.arange(len(x)) % 7 != 3
        parts = list(zip(x.split(4), mask.split(4), strict=True))
        by_hand = nets.sampled([(model(part), own) for part, own in parts], params, seed=4, step=step, kind=kind)
        refreshed = optimizer.refresh_curvature([lambda part=part, own=own: (model(part), own) for part, own in parts])
        assert refreshed == (step % 2 == 0)
        if refreshed:
            for p, reference, s in zip(params, references, by_hand, strict=True):
                reference.refresh((s if reference.hidden else s.square().sum(0)).numpy(), drawn.bases(optimizer, p))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad.numpy(), drawn.bases(optimizer, p))
    for p, reference in zip(params, references, strict=True):
        compare(p, reference.theta, torch.float64, "θ")
        compare_state(optimizer.state[p], reference, torch.float64)


def test_chunks_of_the_estimator_are_forwards():
    """`chunks=5` deals the rows out; as forwards of the same rows they give the same statistics."""
    model = nets.build()
    x, _ = nets.batch()
    dealt = SophiaK(nets.groups(model), estimator=GaussNewtonBartlett(noise="signs", chunks=5))
    dealt.refresh_curvature(lambda: model(x))
    sliced = SophiaK(nets.groups(model))
    order = torch.cat([torch.arange(number, len(x), 5) for number in range(5)])
    sliced.refresh_curvature(nets.forwards(model, x[order]), rows=order)
    for one, other in zip(*(nets.parameters(optimizer) for optimizer in (dealt, sliced)), strict=True):
        for name, value in dealt.state[one].items():
            torch.testing.assert_close(value.abs(), sliced.state[other][name].abs(), rtol=1e-9, atol=1e-12, msg=name)


def test_deferred_logits_give_the_same_refresh():
    model = nets.build()
    model.head = nn.Linear(nets.CLASSES, 9, bias=False).double()
    x, _ = nets.batch()
    states = []
    for readout in (False, True):
        optimizer = SophiaK(nets.groups(model))
        optimizer.refresh_curvature(
            [
                lambda part=part, readout=readout: (
                    deferred_logits(model.body(part), model.head.weight) if readout else model(part)
                )
                for part in x.split(4)
            ]
        )
        states.append([optimizer.state[p] for p in nets.parameters(optimizer)])
    for one, other in zip(*states, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_bases_are_the_eigenvectors_of_the_statistics_and_the_diagonal_is_seen_in_them(dtype):
    """Also where dropout draws: both passes over the chunks see the same masks."""
    model = nets.build(dtype, dropout=0.5)
    optimizer = SophiaK(nets.groups(model), basis="both")
    random_state = torch.get_rng_state()
    optimizer.refresh_curvature(nets.forwards(model, nets.batch(dtype=dtype)[0], size=2))
    assert torch.equal(torch.get_rng_state(), random_state)
    for p in (model.first.weight, model.second.weight):
        own = optimizer.state[p]
        for side, dim in (("row", 1), ("column", 0)):
            basis, statistics = own[f"{side}_basis"], own[f"{side}_statistics"]
            assert basis.dtype == statistics.dtype == torch.float32
            seen = basis.T @ statistics @ basis
            values = seen.diagonal()
            assert bool((values.diff() <= 0).all())
            torch.testing.assert_close(seen, values.diag(), rtol=1e-4, atol=1e-5 * float(values[0]))
            # Σ_j (Q_Rᵀ S Q_C)²_ij is the i-th eigenvalue of Σ S Sᵀ.
            torch.testing.assert_close(own["hessian"].sum(dim), values, rtol=1e-4, atol=1e-5 * float(values[0]))


# ---- how often


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, [2, 0, 1, 0, 1]),
        ({"basis": "both"}, [2, 0, 1, 0, 1]),
        ({"basis": "none"}, [1, 0, 1, 0, 1]),
        ({"max_basis_dim": 1}, [1, 0, 1, 0, 1]),
        ({"factors": "gradients"}, [1, 0, 1, 0, 1]),
        ({"diagonal": "gradients"}, [2, 0, 1, 0, 1]),
        (GRADIENTS, [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_first_refresh_takes_two_passes_and_later_ones_take_one(settings, passes):
    model = nets.build()
    optimizer = SophiaK(nets.groups(model), **SETTINGS, **settings)
    found = []
    for step in range(5):
        before = model.calls
        nets.train(model, optimizer, 1, start=step)
        found.append((model.calls - before - 1) / 5)
    assert found == passes


def test_a_matrix_that_comes_later_has_two_passes_of_its_own():
    """The others are counted once."""
    model = nets.build()
    optimizer = SophiaK([{"params": [model.first.weight]}], **SETTINGS, basis="both")
    x, _ = nets.batch()
    assert optimizer.refresh_curvature(nets.forwards(model, x))
    statistics = optimizer.state[model.first.weight]["row_statistics"].clone()
    optimizer.add_param_group({"params": [model.second.weight]})
    optimizer.param_groups[0]["last_refresh"] = -1  # due again, at the same step: the same sampled gradients
    before = model.calls
    assert optimizer.refresh_curvature(nets.forwards(model, x))
    assert (model.calls - before) == 2 * 5
    torch.testing.assert_close(optimizer.state[model.first.weight]["row_statistics"], statistics)
    assert [float(optimizer.state[p]["refreshes"]) for p in nets.parameters(optimizer)] == [2, 1]


def test_curvature_is_due_only_where_something_uses_it():
    model = nets.build()
    assert not SophiaK(model.parameters(), **GRADIENTS).curvature_due
    assert not SophiaK(model.parameters(), diagonal="gradients", basis="none").curvature_due
    assert not SophiaK(nets.groups(model), hidden=False).curvature_due
    for settings in ({}, {"factors": "curvature"}, {"diagonal": "curvature"}, {"others": "curvature"}):
        optimizer = SophiaK(model.parameters(), **{**GRADIENTS, **settings})
        assert optimizer.curvature_due == bool(settings)
    optimizer = SophiaK(nets.groups(model, others="curvature"), **GRADIENTS)  # one group is enough
    assert optimizer.curvature_due
    assert optimizer.refresh_curvature(nets.forwards(model, nets.batch()[0]))
    assert not optimizer.curvature_due


def test_without_use_for_curvature_none_is_missed():
    """Neither a warning of its age, nor an error because there is none."""
    model = nets.build()
    optimizer = SophiaK(nets.groups(model), **{**SETTINGS, "curvature_interval": 1}, **GRADIENTS)
    nets.train(model, optimizer, 13)
    assert optimizer.refreshes == 0


# ---- refused, and not reached


def spoilt(model, x, passes, value):
    """Forwards whose gradients are not finite from some pass over them on."""
    calls = []

    def forward(part):
        logits = model(part)
        calls.append(part)
        if len(calls) > passes * 5:
            logits.register_hook(lambda gradient: gradient * value)
        return logits

    return [functools.partial(forward, part) for part in x.split(4)]


def not_finite(optimizer, model, value):
    """The like for `update_curvature`."""
    return [
        torch.full((2, *p.shape) if p.ndim == 2 and p is not model.head.weight else p.shape, value, dtype=p.dtype)
        for p in nets.parameters(optimizer)
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("steps", "passes"), [(0, 0), (0, 1), (2, 0), (4, 0), (4, 1)])
def test_a_refused_refresh_changes_nothing_and_stays_due(steps, passes, value):
    model = nets.build()
    second = {"params": [model.second.weight]}
    late = steps == 4  # a matrix that has no bases yet makes it a refresh of two passes again
    optimizer = SophiaK(
        [{"params": [model.first.weight]}, *nets.groups(model, others="curvature")[1:], *([] if late else [second])],
        **SETTINGS,
        basis="both",
    )
    nets.train(model, optimizer, steps)
    if late:
        optimizer.add_param_group(second)
    optimizer._create_state()  # see the next test
    before = Snapshot(optimizer)
    x, _ = nets.batch(steps)
    assert optimizer.curvature_due
    assert not optimizer.refresh_curvature(spoilt(model, x, passes, value))
    assert not optimizer.update_curvature(not_finite(optimizer, model, value))
    group = optimizer.param_groups[0]
    assert (group["refused_refreshes"], group["accepted_refreshes"]) == (2, optimizer.refreshes)
    assert optimizer.curvature_due
    for other, old in zip(optimizer.param_groups, before.groups, strict=True):
        # What is to change: the count, and the scale of the next attempt.
        other.update({name: old[name] for name in ("refused_refreshes", "curvature_scale")})
    before.assert_unchanged()
    assert optimizer.refresh_curvature(nets.forwards(model, x))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_refused_first_refresh_creates_nothing(by_hand):
    """As with Sophia: no state of zeros, where there was none."""
    model = nets.build()
    optimizer = SophiaK(nets.groups(model))
    if by_hand:
        assert not optimizer.update_curvature(not_finite(optimizer, model, torch.nan))
    else:
        assert not optimizer.refresh_curvature(spoilt(model, nets.batch()[0], 0, torch.nan))
    assert not optimizer.state


def test_a_lower_scale_after_a_refused_refresh_does_not_change_the_estimate():
    model = nets.build()
    x, _ = nets.batch()
    states = []
    for refused in (False, True):
        optimizer = SophiaK(nets.groups(model, others="curvature"), basis="both")
        if refused:
            assert not optimizer.refresh_curvature(spoilt(model, x, 0, torch.inf))
            assert optimizer.param_groups[0]["curvature_scale"] == 0.25
        assert optimizer.refresh_curvature(nets.forwards(model, x))
        states.append([value for p in nets.parameters(optimizer) for _, value in sorted(optimizer.state[p].items())])
    assert_same(*states)


def test_parameters_that_no_refresh_has_reached_hold_still():
    """And gather momentum; others, whose rule is made of gradients, need none."""
    model = nets.build()
    optimizer = SophiaK(nets.groups(model, others="curvature"), **SETTINGS)
    x, y = nets.batch()
    assert optimizer.refresh_curvature(lambda: model.second(torch.ones(4, nets.WIDTH, dtype=torch.float64)))
    reached = {model.second.weight, model.second.bias}
    for attempt in range(2):
        values = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if attempt == 0:
            message = r"parameters have gradients, but the curvature refresh did not reach them"
            with pytest.warns(UserWarning, match=message):
                optimizer.step()
        else:
            optimizer.step()
        for (name, p), value in zip(model.named_parameters(), values, strict=True):
            moves = p in reached or name == "first.bias"
            assert torch.equal(p, value) != moves, name
            assert bool(optimizer.state[p]["exp_avg"].any())
    optimizer.refresh_curvature(nets.forwards(model, x))


def test_no_warning_of_parameters_that_move_without_curvature():
    model = nets.build()
    optimizer = SophiaK(nets.groups(model), **SETTINGS)
    x, y = nets.batch()
    optimizer.refresh_curvature(lambda: model.second(torch.tanh(model.first(x))))  # all but the head
    F.cross_entropy(model(x), y).backward()
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


def test_what_has_no_gradient_is_left_alone():
    model = nets.build()
    model.first.weight.requires_grad_(False)
    optimizer = SophiaK(nets.groups(model), **SETTINGS)
    before = model.first.weight.clone()
    nets.train(model, optimizer, 3)
    assert torch.equal(model.first.weight, before)


# ---- the step's surroundings


def test_steps_without_any_refresh_raise():
    model = nets.build()
    optimizer = SophiaK(nets.groups(model))
    x, y = nets.batch()
    F.cross_entropy(model(x), y).backward()
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"optimizer\.refresh_curvature\(lambda: model\(inputs\)\)"):
        optimizer.step()
    before.assert_unchanged()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()  # how distributed checkpoints have the state created
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    assert not any(optimizer.state[p]["step"] for p in model.parameters())
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    with pytest.raises(RuntimeError, match="refresh_curvature"):
        optimizer.step()


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_refresh_leaves_gradients_parameters_and_generators_alone(when):
    model = nets.build(dropout=0.3)
    optimizer = SophiaK(nets.groups(model), **SETTINGS)
    nets.train(model, optimizer, 0 if when == "first" else 2)
    x, y = nets.batch()
    F.cross_entropy(model(x), y).backward()
    before = Snapshot(optimizer)
    assert optimizer.refresh_curvature(nets.forwards(model, x))
    assert_same([p.detach() for p in before.params], before.values)
    for p, (grad, value) in zip(before.params, before.grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert torch.equal(torch.get_rng_state(), before.generator)
    assert all(p.grad_fn is None and p.is_leaf for p in before.params)


def test_found_inf_and_grad_scale():
    """A step that overflowed is none; a scaled gradient is divided."""
    runs = []
    for scaled in (False, True):
        model = nets.build()
        optimizer = SophiaK(nets.groups(model), **SETTINGS)
        for step in range(4):
            x, y = nets.batch(step)
            optimizer.refresh_curvature(nets.forwards(model, x))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (1024 * loss if scaled else loss).backward()
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
                before = Snapshot(optimizer)
                optimizer.step()
                before.assert_unchanged()
                optimizer.found_inf = torch.tensor([0.0])
            optimizer.step()
            if scaled:
                del optimizer.grad_scale, optimizer.found_inf
        runs.append([*(p.detach() for p in model.parameters()), optimizer.state_dict()["param_groups"][0]["clock"]])
    # To rounding: torch's kernel, which would unscale the user's gradients, is for plain ones.
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_learning_rate_may_be_a_tensor():
    runs = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        model = nets.build()
        nets.train(model, SophiaK(nets.groups(model), **{**SETTINGS, "lr": lr}), 3)
        runs.append([p.detach() for p in model.parameters()])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_closure_is_called_once_with_gradients_on():
    model = nets.build()
    optimizer = SophiaK(nets.groups(model), **SETTINGS)
    x, y = nets.batch()
    optimizer.refresh_curvature(nets.forwards(model, x))
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert optimizer.state[model.first.weight]["step"] == 1


def test_attach_is_the_explicit_form_with_the_same_slice():
    models = []
    for attached in (True, False):
        model = nets.build()
        estimator = GaussNewtonBartlett(noise="signs", chunks=3 if attached else 1)  # attach() makes slices of chunks
        optimizer = SophiaK(nets.groups(model), estimator=estimator, **SETTINGS)
        if attached:
            optimizer.attach(model, max_batch=12)
        for step in range(5):
            x, y = nets.batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if not attached:
                optimizer.refresh_curvature(nets.forwards(model, x[:12]))
            optimizer.step()
        assert optimizer.refreshes == 3
        models.append(model)
    assert models[0].calls == 5 + 3 * (2 + 1 + 1)
    assert_same(*([p.detach() for p in model.parameters()] for model in models))


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_the_clip_fraction_is_counted_in_the_bases(exponent):
    model = nets.build()
    gamma = {1.0: 0.5, 0.5: 0.05}[exponent]
    settings = {**SETTINGS, "gamma": gamma, "exponent": exponent}
    optimizer = SophiaK(nets.groups(model, others="curvature"), **settings, basis="both")
    nets.train(model, optimizer, 3)
    clipped = total = 0
    for own in optimizer.state.values():
        if "hessian" in own:  # others are clipped whatever hidden matrices are
            m, divisor = own["exp_avg"], own["hessian"]
            if "row_basis" in own:
                m, divisor = own["row_basis"].T @ m @ own["column_basis"], divisor**exponent
            clipped += int((m.abs() > gamma * divisor).sum())
            total += m.numel()
    found = optimizer.stats()
    assert 0.1 < clipped / total < 0.9
    assert float(found["clip_fraction"]) == pytest.approx(clipped / total)
    norm = sum(float(one["hessian"].square().sum()) for one in optimizer.state.values() if "hessian" in one) ** 0.5
    assert float(found["curvature_norm"]) == pytest.approx(norm)
    assert (float(found["curvature_age"]), float(found["refused_refreshes"])) == (1, 0)
