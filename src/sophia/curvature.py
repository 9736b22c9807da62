"""Curvature estimators, for `SophiaG(estimator=...)` and for optimizers of your own."""

from sophia.optim.curvature import Estimator as Estimator
from sophia.optim.curvature import GaussNewtonBartlett as GaussNewtonBartlett
from sophia.optim.curvature import Hutchinson as Hutchinson
from sophia.optim.curvature import Refresh as Refresh
from sophia.optim.curvature import deferred_logits as deferred_logits

__all__ = ["Estimator", "GaussNewtonBartlett", "Hutchinson", "Refresh", "deferred_logits"]
