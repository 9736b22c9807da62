"""Settings of other implementations: the same steps as theirs, restated here from their formulas."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from sophia.convert import (
    from_levanter,
    from_levanter_g,
    from_official,
    from_optax,
    from_pytorch_optimizer,
)
from sophia.curvature import GaussNewtonBartlett, Hutchinson

STEPS, SIZE, INTERVAL = 23, 40, 4


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


THETA = numbers(0, SIZE)
# Momentum over curvature from much clipped to not at all.
GRADIENTS = numbers(1, STEPS, SIZE) * torch.logspace(-3, 1, SIZE, dtype=torch.float64)
CURVATURES = numbers(2, STEPS, SIZE)  # of either sign, as Hutchinson's
SAMPLED = numbers(3, STEPS, SIZE)  # gradients of mean losses for sampled labels


def ours(optimizer_class, settings, estimates, *, before=lambda optimizer, t: None):
    """θ after each step, from the gradients above; estimates: what to fold in before the step, by its number from 0."""
    p = nn.Parameter(THETA.clone())
    optimizer = optimizer_class([p], **settings)
    path = []
    for t in range(STEPS):
        if t in estimates:
            assert optimizer.update_curvature([estimates[t]])
        before(optimizer, t)
        p.grad = GRADIENTS[t].clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path), optimizer


def clipped_fraction(optimizer):
    return float(optimizer.stats()["clip_fraction"])


# ---- the official code

RULE = {"lr": 3e-3, "betas": (0.9, 0.8), "weight_decay": 0.3}


class Official:
    """The official SophiaG from its formulas: `hessian` has no batch factor, which enters at the step."""

    def __init__(self, p, *, lr, betas, rho, weight_decay, maximize=False):
        self.p, self.state = p, {"step": torch.tensor(0.0), "exp_avg": p * 0, "hessian": p * 0}
        self.group = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "maximize": maximize}
        self.group.update(capturable=False, initial_lr=lr)

    def step(self, grad, bs):
        group, state = self.group, self.state
        state["step"] = state["step"] + 1
        grad = -grad if group["maximize"] else grad
        self.p = self.p * (1 - group["lr"] * group["weight_decay"])
        state["exp_avg"] = group["betas"][0] * state["exp_avg"] + (1 - group["betas"][0]) * grad
        ratio = state["exp_avg"].abs() / (group["rho"] * bs * state["hessian"] + 1e-15)
        self.p = self.p - group["lr"] * state["exp_avg"].sign() * ratio.clamp(max=1)

    def update_hessian(self, grad):
        beta2 = self.group["betas"][1]
        self.state["hessian"] = beta2 * self.state["hessian"] + (1 - beta2) * grad**2

    def state_dict(self):
        return {"state": {0: dict(self.state)}, "param_groups": [{**self.group, "params": [0]}]}


def official(*, bs, first=0, last=STEPS, optimizer=None, **settings):
    """θ after each step, with a refresh after every INTERVAL-th."""
    optimizer = optimizer or Official(THETA.clone(), **RULE, **settings)
    path = []
    for t in range(first, last):
        optimizer.step(GRADIENTS[t], bs)
        path.append(optimizer.p)
        if t % INTERVAL == INTERVAL - 1:
            optimizer.update_hessian(SAMPLED[t])
    return torch.stack(path), optimizer


def official_estimates(predictions, start=0):
    """The same refreshes as estimates of ours: after step n is before step n + 1."""
    return {t: predictions * SAMPLED[t - 1] ** 2 for t in range(INTERVAL, STEPS, INTERVAL) if t >= start}


@pytest.mark.parametrize("bs", [4096, 512, 5120], ids=["right", "too-small", "forgotten"])
@pytest.mark.parametrize("maximize", [False, True])
def test_official_steps(bs, maximize):
    rho, predictions = 1e-5, 4096
    theirs, _ = official(rho=rho, bs=bs, maximize=maximize)
    given = {} if bs == 5120 else {"bs": bs}
    settings = from_official(
        **RULE, rho=rho, predictions=predictions, curvature_interval=INTERVAL, maximize=maximize, **given
    )
    assert settings["gamma"] == pytest.approx(rho * bs / predictions, rel=1e-12)
    # Theirs takes its first steps without curvature; zeros count as a refresh.
    path, optimizer = ours(SophiaG, settings, {0: THETA * 0, **official_estimates(predictions)})
    torch.testing.assert_close(path, theirs, rtol=1e-11, atol=0)
    assert 0.2 < clipped_fraction(optimizer) < 0.9


def test_official_where_bs_was_right_is_rho():
    settings = from_official(rho=0.05, bs=480 * 1024, predictions=480 * 1024)
    assert settings["gamma"] == 0.05
    assert settings["estimator"] == GaussNewtonBartlett()
    assert (settings["lr"], settings["betas"], settings["weight_decay"]) == (1e-4, (0.965, 0.99), 0.1)
    assert settings["eps"] == 1e-15
    assert settings["curvature_interval"] == 10


def test_the_factor_is_the_number_of_predictions():
    """On average N ĝ ⊙ ĝ of the official recipe, our estimate, and the exact Gauss-Newton diagonal are one thing."""
    inputs, model = numbers(4, 24, 5), nn.Linear(5, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(numbers(5, 4, 5))
        p = torch.softmax(model(inputs), -1)
        exact = torch.einsum("nc,ni->ci", p * (1 - p), inputs**2) / len(inputs)
        labels = torch.multinomial(p.repeat(4000, 1), 1, generator=torch.Generator().manual_seed(6))
        residual = p - F.one_hot(labels.view(4000, 24), 4)
        mean_gradients = torch.einsum("snc,ni->sci", residual, inputs) / len(inputs)
    recipe = (mean_gradients**2).mean(0)
    assert float((24 * recipe).sum() / exact.sum()) == pytest.approx(1, abs=0.05)

    settings = from_official(lr=0.0, betas=(0.9, 0.99), bs=24, predictions=24, curvature_interval=1)
    optimizer = SophiaG(model.parameters(), **settings)
    refreshes = 300
    for _ in range(refreshes):
        optimizer.refresh_curvature(lambda: model(inputs))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    h = optimizer.state[model.weight]["hessian"] / (1 - 0.99**refreshes)
    assert float(h.sum() / exact.sum()) == pytest.approx(1, abs=0.15)


# ---- levanter, optax, pytorch_optimizer

CLIPS = [1.0, 0.3, 4.0]


def corrected(*, lr, betas, gamma, eps, clip, weight_decay, refreshed_after):
    """The rule of levanter and optax: bias-corrected momentum, decay added to the update, refreshes after some steps.

    refreshed_after: numbers of steps, from 1, with the estimate that is folded in after them.
    """
    theta, m, h, path = THETA, THETA * 0, THETA * 0, []
    for t in range(1, STEPS + 1):
        m = betas[0] * m + (1 - betas[0]) * GRADIENTS[t - 1]
        update = (m / (1 - betas[0] ** t) / (gamma * h).clamp(min=eps)).clamp(-clip, clip)
        theta = theta - lr * (update + weight_decay * theta)
        if t in refreshed_after:
            h = betas[1] * h + (1 - betas[1]) * refreshed_after[t]
        path.append(theta)
    return torch.stack(path)


def momentum_corrected(settings):
    """What docs/moving.md gives for the correction: γ and ε times 1 − β1ᵗ."""

    def before(optimizer, t):
        (group,) = optimizer.param_groups
        for name in ("gamma", "eps"):
            group[name] = settings[name] * (1 - settings["betas"][0] ** (t + 1))

    return before


@pytest.mark.parametrize("clip", CLIPS)
def test_levanter_steps(clip):
    after = {t: CURVATURES[t] for t in range(INTERVAL, STEPS, INTERVAL)}
    common = {"gamma": 0.7, "weight_decay": 0.3}
    rule = {"lr": 3e-3, "betas": (0.9, 0.8), "eps": 1e-3, "clip": clip, **common}
    theirs = corrected(**rule, refreshed_after=after)
    settings = from_levanter(
        learning_rate=3e-3, beta1=0.9, beta2=0.8, epsilon=1e-3, clip_threshold=clip, update_interval=INTERVAL, **common
    )
    path, optimizer = ours(SophiaH, settings, {0: THETA * 0, **after}, before=momentum_corrected(settings))
    torch.testing.assert_close(path, theirs, rtol=1e-11, atol=0)
    assert 0.2 < clipped_fraction(optimizer) < 0.95


@pytest.mark.parametrize("clip", CLIPS)
def test_optax_steps(clip):
    after = {t: CURVATURES[t] for t in range(1, STEPS, INTERVAL)}
    common = {"gamma": 0.7, "eps": 1e-3, "weight_decay": 0.3}
    theirs = corrected(lr=3e-3, betas=(0.9, 0.8), clip=clip, **common, refreshed_after=after)
    settings = from_optax(learning_rate=3e-3, b1=0.9, b2=0.8, clip_threshold=clip, update_interval=INTERVAL, **common)
    path, _ = ours(SophiaH, settings, {0: THETA * 0, **after}, before=momentum_corrected(settings))
    torch.testing.assert_close(path, theirs, rtol=1e-11, atol=0)


def pytorch_optimizer(*, lr, betas, p, eps, weight_decay, estimates, maximize=False):
    """The rule of its SophiaH: no γ, a clip at p."""
    theta, m, h, path = THETA, THETA * 0, THETA * 0, []
    for t in range(STEPS):
        if t in estimates:
            h = betas[1] * h + (1 - betas[1]) * estimates[t]
        theta = theta * (1 - lr * weight_decay)
        m = betas[0] * m + (1 - betas[0]) * GRADIENTS[t] * (-1 if maximize else 1)
        theta = theta - lr * (m / h.clamp(min=eps)).clamp(-p, p)
        path.append(theta)
    return torch.stack(path)


@pytest.mark.parametrize("p", [0.01, 0.7, 3.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_pytorch_optimizer_steps(p, maximize):
    rule = {"lr": 6e-3, "betas": (0.9, 0.8), "p": p, "eps": 1e-3, "weight_decay": 0.3, "maximize": maximize}
    estimates = {t: CURVATURES[t] for t in range(0, STEPS, INTERVAL)}
    theirs = pytorch_optimizer(**rule, estimates=estimates)
    path, optimizer = ours(SophiaH, from_pytorch_optimizer(**rule, update_period=INTERVAL), estimates)
    torch.testing.assert_close(path, theirs, rtol=1e-11, atol=0)
    assert 0.2 < clipped_fraction(optimizer) < 1


def test_levanter_g():
    """Its h is n ĝ ⊙ ĝ, ours N ĝ ⊙ ĝ."""
    given = {"learning_rate": 1e-3, "weight_decay": 0.2, "clip_threshold": 2.0, "rng_seed": 3}
    settings = from_levanter_g(gamma=200, predictions=4000, num_data_points=2, **given)
    assert settings["gamma"] * 4000 == pytest.approx(2 * 200 * 2)
    assert settings["estimator"] == GaussNewtonBartlett()
    assert settings["seed"] == 3
    assert {**settings, "gamma": 0, "estimator": 0} == {**from_levanter(**given), "gamma": 0, "estimator": 0}


def test_defaults_of_the_others():
    """Calls without arguments give what calls without arguments do there."""
    common = {"curvature_interval": 10, "bias_correction": False}
    gaussian, signs = {"estimator": Hutchinson()}, {"estimator": Hutchinson(noise="rademacher")}
    paper = {"betas": (0.96, 0.99), "gamma": 0.01, "eps": 1e-12}
    assert from_levanter() == {"lr": 6e-4, "weight_decay": 0.1, "seed": 0, **paper, **common, **gaussian}
    optax = {"lr": 1e-3, "betas": (0.965, 0.99), "gamma": 0.01, "eps": 1e-8, "weight_decay": 1e-4}
    assert from_optax(learning_rate=1e-3) == {**optax, **common, **signs}
    found = from_pytorch_optimizer()
    assert found == {**paper, "eps": found["eps"], "lr": found["lr"], "weight_decay": 0, **common, **gaussian} | {
        "maximize": False,
        "foreach": None,
    }
    assert (found["lr"], found["eps"]) == pytest.approx((6e-4, 1e-14))
    assert from_pytorch_optimizer(hessian_distribution="rademacher")["estimator"] == Hutchinson(noise="rademacher")


def test_lr_as_a_tensor():
    lr = torch.tensor(1e-3)
    assert from_optax(learning_rate=lr)["lr"] is lr
    torch.testing.assert_close(from_optax(learning_rate=lr, clip_threshold=0.5)["lr"], lr / 2)
    assert from_official(lr=lr, predictions=10)["lr"] is lr


SCHEDULE = lambda step: 1e-3  # noqa: E731
SETTINGS_ERRORS = [
    (from_official, {"predictions": 0}, "predictions=0 must be a finite number above 0"),
    (from_official, {"predictions": float("nan")}, "predictions=nan must be"),
    (from_official, {"predictions": 8, "bs": -8}, "bs=-8 must be"),
    (from_official, {"predictions": "8"}, "predictions='8' must be"),
    (from_official, {"predictions": 8, "rho": -0.1}, "rho=-0.1 must be a finite number of at least 0"),
    (from_official, {"predictions": 8, "rho": None}, "rho=None must be"),
    (from_levanter, {"gamma": float("inf")}, "gamma=inf must be"),
    (from_levanter_g, {"predictions": 8, "gamma": "200"}, "gamma='200' must be"),
    (from_optax, {"eps": None}, "eps=None must be"),
    (from_optax, {"weight_decay": -1e-4}, "weight_decay=-0.0001 must be"),
    (from_levanter, {"clip_threshold": None}, "clip_threshold=None has no counterpart: .* 1.0 is the paper's"),
    (from_levanter, {"clip_threshold": 0.0}, "clip_threshold=0.0 must be a finite number above 0"),
    (from_levanter, {"weight_decay_modules": ["attn"]}, r"weight_decay_modules=\['attn'\] .* two param groups"),
    (from_levanter, {"default_weight_decay_mask": True}, "default_weight_decay_mask=True .* two param groups"),
    (from_levanter_g, {"predictions": 8, "num_data_points": 0}, "num_data_points=0 must be"),
    (from_levanter_g, {"predictions": 8, "clip_threshold": None}, "clip_threshold=None has no counterpart"),
    (from_optax, {"clip_threshold": None}, "clip_threshold=None has no counterpart"),
    (from_optax, {"learning_rate": SCHEDULE}, "is a schedule, .*LambdaLR"),
    (from_optax, {"weight_decay_mask": {"w": True}}, "weight_decay_mask={'w': True} .* two param groups"),
    (from_optax, {"hessian_diagonal_fn": 1}, "hessian_diagonal_fn=1 has no counterpart .* update_curvature"),
    (from_optax, {"mu_dtype": "bfloat16"}, "mu_dtype='bfloat16' .* state_dtype=torch.bfloat16"),
    (from_optax, {"verbose": True}, "verbose=True has no counterpart, .*clip_fraction"),
    (from_optax, {"print_win_rate_every_n_steps": 5}, "print_win_rate_every_n_steps=5 has no counterpart"),
    (from_pytorch_optimizer, {"p": 0.0}, "p=0.0 must be a finite number above 0"),
    (from_pytorch_optimizer, {"num_samples": 3}, "num_samples=3 has no counterpart, .*rademacher"),
    (from_pytorch_optimizer, {"hessian_distribution": "normal"}, "hessian_distribution='normal' is not one of"),
    (from_pytorch_optimizer, {"weight_decouple": False, "weight_decay": 0.1}, "weight_decouple=False .* .grad before"),
    (from_pytorch_optimizer, {"fixed_decay": True, "weight_decay": 0.1}, "fixed_decay=True .* weight_decay / lr"),
]


@pytest.mark.parametrize(("convert", "given", "message"), SETTINGS_ERRORS)
def test_settings_errors(convert, given, message):
    required = {"learning_rate": 1e-3} if convert is from_optax else {}
    with pytest.raises(ValueError, match=message):
        convert(**{**required, **given})


def test_decay_that_makes_no_difference_is_no_error():
    assert from_pytorch_optimizer(weight_decouple=False, fixed_decay=True)["weight_decay"] == 0
    assert from_levanter(default_weight_decay_mask=False)["weight_decay"] == 0.1


def test_a_decay_that_the_error_gives_is_the_same():
    """fixed_decay shrinks by 1 − weight_decay whatever lr is; with weight_decay / lr ours does."""
    lr, weight_decay = 0.06, 0.01
    settings = from_pytorch_optimizer(lr=lr, weight_decay=weight_decay / lr)
    assert settings["lr"] * settings["weight_decay"] == pytest.approx(weight_decay)


def test_unknown_settings_are_errors():
    with pytest.raises(TypeError, match="gamma"):
        from_official(gamma=0.05, predictions=8)
    with pytest.raises(TypeError, match="predictions"):
        from_official(rho=0.05, bs=8)


# ---- the packages themselves


def test_pytorch_optimizer_itself():
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    rule = {"lr": 6e-3, "betas": (0.9, 0.8), "p": 0.7, "eps": 1e-3, "weight_decay": 0.3}
    p = nn.Parameter(THETA.clone())
    optimizer = package.SophiaH([p], **rule, update_period=1000)
    path = []
    # Its first step estimates, when it is given none.
    estimates = {t: CURVATURES[t] for t in range(0, STEPS, INTERVAL)}
    for t in range(STEPS):
        p.grad = GRADIENTS[t].clone()
        optimizer.step(hessian=[estimates[t]] if t in estimates else None)
        path.append(p.detach().clone())
    mine, _ = ours(SophiaH, from_pytorch_optimizer(**rule), estimates)
    torch.testing.assert_close(mine, torch.stack(path), rtol=1e-11, atol=0)


@pytest.mark.parametrize("clip", CLIPS)
def test_optax_itself(clip):
    optax = pytest.importorskip("optax", reason="optax is not installed")
    jax, numpy = pytest.importorskip("jax", reason="jax is not installed"), pytest.importorskip("numpy")
    arguments = {"b1": 0.9, "b2": 0.8, "gamma": 0.7, "eps": 1e-3, "weight_decay": 0.3, "clip_threshold": clip}
    arguments |= {"learning_rate": 3e-3, "update_interval": INTERVAL}
    estimates = jax.numpy.asarray(CURVATURES.float().numpy())
    # An estimator that looks up the estimate of the step, counted by the refreshes.
    lookup = optax.GradientTransformation(
        lambda params: jax.numpy.asarray(1), lambda grads, n, params: (estimates[n], n + INTERVAL)
    )
    transform = optax.contrib.sophia(hessian_diagonal_fn=lookup, **arguments)
    theta = jax.numpy.asarray(THETA.float().numpy())
    state, path = transform.init(theta), []
    for t in range(STEPS):
        update, state = transform.update(jax.numpy.asarray(GRADIENTS[t].float().numpy()), state, theta)
        theta = optax.apply_updates(theta, update)
        path.append(torch.from_numpy(numpy.array(theta)).double())
    settings = from_optax(**arguments)
    after = {t: CURVATURES[t] for t in range(1, STEPS, INTERVAL)}
    mine, _ = ours(SophiaH, settings, {0: THETA * 0, **after}, before=momentum_corrected(settings))
    torch.testing.assert_close(mine, torch.stack(path), rtol=1e-4, atol=1e-6)
