"""The two optimizers of the paper: the rule with each of its estimators."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sophia.optim import checks
from sophia.optim.curvature import Estimator, GaussNewtonBartlett, Hutchinson
from sophia.optim.sophia import Sophia


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator, the paper's better one (section 2.3): see :class:`Sophia`.

    Example:
        >>> optimizer = SophiaG(model.parameters(), lr=6e-4, weight_decay=0.2)
        >>> for inputs, targets in loader:
        ...     optimizer.refresh_curvature(lambda: model(inputs))  # acts on every 10th step only
        ...     loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    PAPER: ClassVar[Mapping[str, Any]] = MappingProxyType({**Sophia.PAPER, "estimator": GaussNewtonBartlett()})
    """See `Sophia.PAPER`; of the estimate's rows the paper takes half of the batch."""

    @checks.explain_keywords
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float | Literal["auto"] = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        curvature_interval: int = 10,
        *,
        estimator: Estimator | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: Literal["mean", "sum", "none"] = "mean",
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        bias_correction: bool = False,
        clip_target: float | None = None,
    ) -> None:
        """Build the optimizer; `estimator=None` is `GaussNewtonBartlett()`. See :class:`Sophia` for the arguments."""
        super().__init__(
            params,
            lr,
            betas,
            gamma,
            eps,
            weight_decay,
            curvature_interval,
            estimator=GaussNewtonBartlett() if estimator is None else estimator,
            seed=seed,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            state_dtype=state_dtype,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
            bias_correction=bias_correction,
            clip_target=clip_target,
        )


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimator (section 2.3): see :class:`Sophia`. `forward` returns the mean loss.

    Example:
        >>> optimizer = SophiaH(model.parameters(), lr=6e-4, weight_decay=0.2)
        >>> loss = lambda: F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        >>> optimizer.refresh_curvature(loss)
        >>> loss().backward()
        >>> optimizer.step()
    """

    PAPER: ClassVar[Mapping[str, Any]] = MappingProxyType({**Sophia.PAPER, "gamma": 0.01, "estimator": Hutchinson()})
    """See `Sophia.PAPER`; of the estimate's rows the paper takes 32 of 480."""

    @checks.explain_keywords
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float | Literal["auto"] = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        curvature_interval: int = 10,
        *,
        estimator: Estimator | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: Literal["mean", "sum", "none"] = "mean",
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        bias_correction: bool = False,
        clip_target: float | None = None,
    ) -> None:
        """Build the optimizer; `estimator=None` is `Hutchinson()`. See :class:`Sophia` for the arguments."""
        super().__init__(
            params,
            lr,
            betas,
            gamma,
            eps,
            weight_decay,
            curvature_interval,
            estimator=Hutchinson() if estimator is None else estimator,
            seed=seed,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            state_dtype=state_dtype,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
            bias_correction=bias_correction,
            clip_target=clip_target,
        )
