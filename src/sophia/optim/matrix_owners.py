"""Hidden matrices that an engine keeps in shards (FSDP2, HSDP): each has one rank that puts it together and turns it.

A basis turns whole rows and columns, which no rank has. So the owner of a matrix gets its shards, computes, and sends
the shards of the result back; it alone holds bases, statistics and diagonal. Matrices travel in rounds in which a rank
owns at most one: all compute at once, and none holds more than one whole matrix beside its state.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sophia.optim.dtensor import is_dtensor
from sophia.optim.replicas import wire_device


class Place(NamedTuple):
    """Where a matrix lies."""

    shape: tuple[int, ...]
    """Of the whole matrix."""
    dim: int
    """That is cut into shards, as by `torch.chunk`."""
    ranks: dist.ProcessGroup
    """Process group of those that have a shard each."""
    size: int
    """Their number."""
    rank: int
    """This process among them."""
    owner: int
    """The one among them that puts the matrix together."""

    @property
    def here(self) -> bool:
        """Whether this process is the owner."""
        return self.owner == self.rank

    def shard_shape(self, rank: int) -> list[int]:
        """Of the shard of a rank; it may be empty."""
        shape = list(self.shape)
        largest = -(-shape[self.dim] // self.size)
        shape[self.dim] = max(0, min(largest, shape[self.dim] - rank * largest))
        return shape

    def shard_sizes(self) -> list[int]:
        """Elements of all shards."""
        return [torch.Size(self.shard_shape(rank)).numel() for rank in range(self.size)]


class _Placed(Protocol):
    @property
    def place(self) -> Place | None: ...


One = TypeVar("One", bound=_Placed)


def cuts(p: Tensor) -> list[int]:
    """The mesh dimensions over which a parameter is not replicated: none for a plain tensor."""
    if not is_dtensor(p):
        return []
    return [
        number
        for number, placement in enumerate(p.placements)
        if not placement.is_replicate() and p.device_mesh.size(number) > 1
    ]


def assign(groups: Iterable[Iterable[Tensor]]) -> dict[Tensor, Place]:
    """Give each sharded matrix to the rank with the least work so far, the largest of a group first.

    A function of order and shapes alone, the same on all ranks. Groups that come later change nothing for those before.

    Args:
        groups: the hidden matrices of each param group.
    """
    places: dict[Tensor, Place] = {}
    loads: dict[Any, list[int]] = {}
    for matrices in groups:
        for p in sorted((p for p in matrices if cuts(p)), key=_work, reverse=True):
            assert is_dtensor(p)
            (number,) = cuts(p)
            mesh = p.device_mesh
            ranks, size = mesh.get_group(number), mesh.size(number)
            load = loads.setdefault(ranks, [0] * size)
            owner = load.index(min(load))
            load[owner] += _work(p)
            dim = p.placements[number].dim % p.ndim  # type: ignore[attr-defined]
            places[p] = Place(tuple(p.shape), dim, ranks, size, mesh.get_local_rank(number), owner)
    return places


def rounds(members: Iterable[tuple[One, torch.dtype]]) -> list[list[One]]:
    """Matrices whose shards can travel together, of which no rank puts two together; whole ones each on its own.

    Args:
        members: what lies at a place (None: is whole), and the dtype in which it travels.
    """
    alone: list[list[One]] = []
    found: dict[Any, list[list[One]]] = {}
    counts: dict[Any, int] = {}
    for one, dtype in members:
        if one.place is None:
            alone.append([one])
            continue
        kind = (one.place.ranks, dtype)
        number = counts.get((kind, one.place.owner), 0)
        counts[kind, one.place.owner] = number + 1
        several = found.setdefault(kind, [])
        if number == len(several):
            several.append([])
        several[number].append(one)
    return [*alone, *(one for several in found.values() for one in several)]


def gathered(places: Sequence[Place | None], shards: Sequence[Tensor]) -> Tensor | None:
    """The matrix of a round that this rank owns, from the shards of all; None if it owns none of them.

    Args:
        places: of the matrices of a round, or of some of them.
        shards: this rank's, of each.
    """
    lying = [place for place in places if place is not None]
    if not lying:  # whole, or nothing
        return shards[0] if shards else None
    sent = [0] * lying[0].size
    for place, shard in zip(lying, shards, strict=True):
        sent[place.owner] = shard.numel()
    ordered = sorted(zip(lying, shards, strict=True), key=lambda pair: pair[0].owner)
    mine = next((place for place in lying if place.here), None)
    received = [0] * lying[0].size if mine is None else mine.shard_sizes()
    flat = _exchange(torch.cat([shard.reshape(-1) for _, shard in ordered]), sent, received, lying[0].ranks)
    if mine is None:
        return None
    parts = [part.view(mine.shard_shape(rank)) for rank, part in enumerate(torch.split(flat, received))]
    return torch.cat(parts, dim=mine.dim)


def scattered(places: Sequence[Place | None], whole: Tensor | None, like: Tensor) -> list[Tensor]:
    """This rank's shard of each matrix, from their owners: the way back from :func:`gathered`.

    Args:
        places: of the matrices.
        whole: the one that this rank owns, if it owns one.
        like: a tensor of the dtype and on the device of all.
    """
    lying = [place for place in places if place is not None]
    if not lying:
        return [] if whole is None else [whole]
    mine = next((place for place in lying if place.here), None)
    sent, flat = [0] * lying[0].size, like.new_empty(0)
    if mine is not None:
        assert whole is not None
        sent = mine.shard_sizes()
        largest = max(1, mine.shard_shape(0)[mine.dim])
        flat = torch.cat([part.reshape(-1) for part in torch.split(whole, largest, dim=mine.dim)])
    received = [0] * lying[0].size
    for place in lying:
        received[place.owner] = place.shard_sizes()[place.rank]
    parts = torch.split(_exchange(flat, sent, received, lying[0].ranks), received)
    return [parts[place.owner].view(place.shard_shape(place.rank)) for place in lying]


def copied(place: Place, tensor: Tensor | None, like: Tensor) -> Tensor:
    """A tensor that the owner of a matrix holds, on all ranks.

    Args:
        place: of the matrix.
        tensor: on the owner; it is returned there.
        like: of its shape and dtype, on the device where the copy is wanted; its values do not count.
    """
    wire = wire_device(place.ranks, like.device)
    sent = (tensor if place.here and tensor is not None else like).to(wire).contiguous()
    dist.broadcast(sent, src=dist.get_global_rank(place.ranks, place.owner), group=place.ranks)
    return tensor if place.here and tensor is not None else sent.to(like.device)


def _work(p: Tensor) -> int:
    """About proportional to what a step computes: products with the smaller side."""
    return p.numel() * min(p.shape)


def _exchange(flat: Tensor, sent: list[int], received: list[int], ranks: dist.ProcessGroup) -> Tensor:
    """What the ranks have for this one, in their order, for what it has for them."""
    wire = wire_device(ranks, flat.device)
    found = torch.empty(sum(received), dtype=flat.dtype, device=wire)
    dist.all_to_all_single(found, flat.to(wire), received, sent, group=ranks)
    return found.to(flat.device)
