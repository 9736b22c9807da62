"""Moving in: settings and state of other implementations of Sophia, in this one's terms (docs/moving.md).

>>> settings = from_official(lr=6e-4, rho=0.05, weight_decay=0.2, bs=480 * 1024, predictions=480 * 1024)
>>> optimizer = SophiaG(model.parameters(), **settings)
"""

from sophia.convert.settings import from_levanter as from_levanter
from sophia.convert.settings import from_levanter_g as from_levanter_g
from sophia.convert.settings import from_official as from_official
from sophia.convert.settings import from_optax as from_optax
from sophia.convert.settings import from_pytorch_optimizer as from_pytorch_optimizer
from sophia.convert.state import official_state_dict as official_state_dict

__all__ = [
    "from_levanter",
    "from_levanter_g",
    "from_official",
    "from_optax",
    "from_pytorch_optimizer",
    "official_state_dict",
]
