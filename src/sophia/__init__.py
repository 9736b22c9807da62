"""Sophia: the optimizer of arXiv 2305.14342 for PyTorch, and a fair race against AdamW.

>>> from sophia import SophiaG
"""

from sophia import convert as convert
from sophia import curvature as curvature
from sophia.optim import Sophia as Sophia
from sophia.optim import SophiaG as SophiaG
from sophia.optim import SophiaH as SophiaH
from sophia.optim import SophiaK as SophiaK

__version__ = "0.1.0"

__all__ = ["Sophia", "SophiaG", "SophiaH", "SophiaK", "__version__", "convert", "curvature"]
