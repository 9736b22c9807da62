"""Hidden matrices on their way to the ranks that turn them, and back: `matrix_owners` for members of the optimizer."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from sophia.optim import matrix_owners, update
from sophia.optim.matrix_member import Member


def rounds(members: Iterable[Member]) -> list[list[Member]]:
    """Those whose shards can travel together, of which no rank puts two together; whole ones each on its own."""
    return matrix_owners.rounds((one, update.compute_dtype(one.p)) for one in members)


def gathered(several: Sequence[Member], parts: Sequence[Tensor]) -> Tensor | None:
    """The one of them that this rank turns, from all ranks' parts."""
    return matrix_owners.gathered([one.place for one in several], parts)


def scattered(several: Sequence[Member], whole: Tensor | None, like: Tensor) -> list[Tensor]:
    """This rank's part of each, from those that have turned them."""
    return matrix_owners.scattered([one.place for one in several], whole, like)
