"""Settings of other implementations, under their names and with their defaults, as keyword arguments for ours.

Sources and formulas: docs/moving.md. What has no counterpart here is a ValueError.
"""

import math
from typing import Any, Literal

from torch import Tensor

from sophia.optim import checks
from sophia.optim.curvature import GaussNewtonBartlett, Hutchinson

_OFFICIAL_EPS = 1e-15  # added to the denominator there


def from_official(
    *,
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    bs: float = 5120,
    predictions: float,
    curvature_interval: int = 10,
    maximize: bool = False,
    capturable: bool = False,
) -> dict[str, Any]:
    """Settings of the official SophiaG (Liuhong99/Sophia) as keyword arguments for :class:`~sophia.SophiaG`.

    Its denominator is rho · bs · hessian + 1e-15, with `hessian` the average of ĝ ⊙ ĝ. Ours is max(γ h, ε), with h the
    average of N ĝ ⊙ ĝ. So γ = rho · bs / N, which is rho where bs was right.

    Args:
        lr, betas, rho, weight_decay, maximize, capturable: as given to its constructor.
        bs: as given to its `step(bs=...)`; 5120 is what a `step()` without it takes.
        predictions: N, how many predictions `update_hessian()`'s gradient was the mean of, over all ranks and
            accumulated micro-batches: tokens for a language model, images for a classifier. Of a sum over N
            predictions that was divided by D instead, it is D² / N.
        curvature_interval: k, after how many steps its loop called `update_hessian()`.

    Raises:
        ValueError: bs or predictions are not positive, or rho is negative.
    """
    return {
        "lr": lr,
        "betas": betas,
        "gamma": _at_least_zero("rho", rho) * (positive("bs", bs) / positive("predictions", predictions)),
        "eps": _OFFICIAL_EPS,
        "weight_decay": weight_decay,
        "curvature_interval": curvature_interval,
        "estimator": GaussNewtonBartlett(),
        "bias_correction": False,
        "maximize": maximize,
        "capturable": capturable,
    }


def from_levanter(
    *,
    learning_rate: float = 6e-4,
    weight_decay: float = 0.1,
    beta1: float = 0.96,
    beta2: float = 0.99,
    gamma: float = 0.01,
    epsilon: float = 1e-12,
    clip_threshold: float | None = 1.0,
    update_interval: int = 10,
    rng_seed: int = 0,
    weight_decay_modules: object = None,
    default_weight_decay_mask: bool | None = None,
) -> dict[str, Any]:
    """Fields of levanter's `SophiaHConfig` as keyword arguments for :class:`~sophia.SophiaH`.

    With c its clip_threshold: η = c · learning_rate, γ = c · gamma, ε = c · epsilon, λ = weight_decay / c. It divides
    the momentum by 1 − β1ᵗ, which this one does not.

    `weight_decay` is that of the weights which it decays: by default not those of LayerNorm, RMSNorm and embeddings,
    and no bias. Give those a param group with weight_decay=0.

    Raises:
        ValueError: clip_threshold is None or not positive, or decayed weights are chosen by name.
    """
    if weight_decay_modules is not None:
        raise _no_mask("weight_decay_modules", weight_decay_modules)
    if default_weight_decay_mask:
        raise _no_mask("default_weight_decay_mask", default_weight_decay_mask)
    return {
        **_clipped_at("clip_threshold", clip_threshold, learning_rate, gamma, epsilon, weight_decay),
        "betas": (beta1, beta2),
        "curvature_interval": update_interval,
        "estimator": Hutchinson(),
        "bias_correction": False,
        "seed": rng_seed,
    }


def from_levanter_g(
    *, gamma: float = 0.05, predictions: float, num_data_points: float = 1, **others: Any
) -> dict[str, Any]:
    """Fields of `SophiaGConfig`, which early versions of levanter had, as keyword arguments for `SophiaG`.

    As :func:`from_levanter`, and γ = c · gamma · num_data_points / predictions.

    Args:
        gamma: its gamma.
        predictions: N, how many predictions the gradient that it squared was the mean of.
        num_data_points: its factor on ĝ ⊙ ĝ, what the objective's method of that name returned; 1 if it had none.
        others: the other fields, as for :func:`from_levanter`.

    Raises:
        ValueError: as :func:`from_levanter`, or a count is not positive.
    """
    factor = positive("num_data_points", num_data_points) / positive("predictions", predictions)
    return {
        **from_levanter(gamma=_at_least_zero("gamma", gamma) * factor, **others),
        "estimator": GaussNewtonBartlett(),
    }


def from_optax(
    *,
    learning_rate: float | Tensor,
    b1: float = 0.965,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    weight_decay_mask: object = None,
    gamma: float = 0.01,
    clip_threshold: float | None = 1.0,
    update_interval: int = 10,
    hessian_diagonal_fn: object = None,
    mu_dtype: object = None,
    verbose: bool = False,
    print_win_rate_every_n_steps: int = 0,
) -> dict[str, Any]:
    """Arguments of `optax.contrib.sophia` as keyword arguments for :class:`~sophia.SophiaH`.

    With c its clip_threshold: η = c · learning_rate, γ = c · gamma, ε = c · eps, λ = weight_decay / c. It divides the
    momentum by 1 − b1ᵗ, which this one does not. Its estimator is Hutchinson's with random signs.

    Raises:
        ValueError: clip_threshold is None or not positive, learning_rate is a schedule, or a setting is given that has
            no counterpart: weight_decay_mask, hessian_diagonal_fn, mu_dtype, verbose, print_win_rate_every_n_steps.
    """
    if weight_decay_mask is not None:
        raise _no_mask("weight_decay_mask", weight_decay_mask)
    if hessian_diagonal_fn is not None:
        raise ValueError(
            f"hessian_diagonal_fn={hessian_diagonal_fn!r} has no counterpart that could be made of it: leave it out, "
            "and replace `estimator` in the result, or hand its estimates to update_curvature()"
        )
    if mu_dtype is not None:
        raise ValueError(
            f"mu_dtype={mu_dtype!r} is the momentum's dtype alone, which has no counterpart: leave it out, and give "
            "the optimizer state_dtype=torch.bfloat16, which holds for momentum and curvature"
        )
    for name, value in (("verbose", verbose), ("print_win_rate_every_n_steps", print_win_rate_every_n_steps)):
        if value:
            raise ValueError(
                f"{name}={value!r} has no counterpart, as this optimizer does not print: leave it out, and log "
                '1 - optimizer.stats()["clip_fraction"], which is the win rate'
            )
    return {
        **_clipped_at("clip_threshold", clip_threshold, learning_rate, gamma, eps, weight_decay),
        "betas": (b1, b2),
        "curvature_interval": update_interval,
        "estimator": Hutchinson(noise="rademacher"),
        "bias_correction": False,
    }


def from_pytorch_optimizer(
    *,
    lr: float | Tensor = 6e-2,
    betas: tuple[float, float] = (0.96, 0.99),
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    p: float = 1e-2,
    update_period: int = 10,
    num_samples: int = 1,
    hessian_distribution: Literal["gaussian", "rademacher"] = "gaussian",
    eps: float = 1e-12,
    maximize: bool = False,
    foreach: bool | None = None,
) -> dict[str, Any]:
    """Settings of pytorch_optimizer's `SophiaH` as keyword arguments for :class:`~sophia.SophiaH`.

    It has no γ and clips m / max(h, eps) at p. So η = p · lr, γ = p, ε = p · eps, λ = weight_decay / p.

    Raises:
        ValueError: p is not positive, or the decay (weight_decouple, fixed_decay) or the estimate (num_samples,
            hessian_distribution) is one that has no counterpart.
    """
    if num_samples != 1:
        raise ValueError(
            f"num_samples={num_samples!r} has no counterpart, as a refresh draws one direction: leave it 1 (beta2 "
            'averages over refreshes), and for less noise take hessian_distribution="rademacher"'
        )
    if hessian_distribution not in ("gaussian", "rademacher"):
        raise ValueError(f"hessian_distribution={hessian_distribution!r} is not one of 'gaussian', 'rademacher'")
    if weight_decay and not weight_decouple:
        raise ValueError(
            f"weight_decouple=False with weight_decay={weight_decay!r} has no counterpart, as the decay here is always "
            "decoupled: give weight_decay=0, and add weight_decay times the parameter to its .grad before step()"
        )
    if weight_decay and fixed_decay:
        raise ValueError(
            f"fixed_decay=True with weight_decay={weight_decay!r} has no counterpart, as the decay here follows the "
            "learning rate: give fixed_decay=False and weight_decay / lr, the same as long as lr stays what it is"
        )
    return {
        **_clipped_at("p", p, lr, 1.0, eps, weight_decay),
        "betas": betas,
        "curvature_interval": update_period,
        "estimator": Hutchinson(noise=hessian_distribution),
        "bias_correction": False,
        "maximize": maximize,
        "foreach": foreach,
    }


def _clipped_at(
    name: str, clip: float | None, lr: float | Tensor, gamma: float, eps: float, weight_decay: float
) -> dict[str, Any]:
    """lr, gamma, eps and weight_decay for a rule that clips m / max(gamma h, eps) at another bound than 1."""
    if callable(lr):
        raise ValueError(
            f"learning_rate={lr!r} is a schedule, which torch keeps outside of the optimizer: give the rate that it is "
            "to multiply, and a torch.optim.lr_scheduler.LambdaLR of the schedule divided by that"
        )
    if clip is None:
        raise ValueError(
            f"{name}=None has no counterpart: unclipped, a coordinate without curvature would move by m / eps, and the "
            "rule here always clips; give a number, 1.0 is the paper's"
        )
    clip = positive(name, clip)
    return {
        "lr": lr if clip == 1 else lr * clip,
        "gamma": _at_least_zero("gamma", gamma) * clip,
        "eps": _at_least_zero("eps", eps) * clip,
        "weight_decay": _at_least_zero("weight_decay", weight_decay) / clip,
    }


def positive(name: str, value: float) -> float:
    """The value, a finite number above 0, or a ValueError that names it."""
    if not checks.is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number above 0")
    return value


def _at_least_zero(name: str, value: float) -> float:
    if not checks.is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
    return value


def _no_mask(name: str, value: object) -> ValueError:
    return ValueError(
        f"{name}={value!r} has no counterpart, as parameters have other names here: leave it out, and give the "
        "optimizer two param groups, one of them with weight_decay=0"
    )
