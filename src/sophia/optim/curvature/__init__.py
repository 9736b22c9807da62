"""Estimators of the diagonal of the loss's curvature."""

from sophia.optim.curvature.deferred import deferred_logits as deferred_logits
from sophia.optim.curvature.estimator import Estimator as Estimator
from sophia.optim.curvature.estimator import Forward as Forward
from sophia.optim.curvature.estimator import Refresh as Refresh
from sophia.optim.curvature.gauss_newton_bartlett import GaussNewtonBartlett as GaussNewtonBartlett
from sophia.optim.curvature.hutchinson import Hutchinson as Hutchinson

__all__ = ["Estimator", "Forward", "GaussNewtonBartlett", "Hutchinson", "Refresh", "deferred_logits"]
