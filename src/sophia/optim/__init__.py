"""The library: optimizers and curvature estimators. Imports torch only."""

from sophia.optim.sophia import Sophia as Sophia
from sophia.optim.sophia_k import SophiaK as SophiaK
from sophia.optim.variants import SophiaG as SophiaG
from sophia.optim.variants import SophiaH as SophiaH

__all__ = ["Sophia", "SophiaG", "SophiaH", "SophiaK"]
