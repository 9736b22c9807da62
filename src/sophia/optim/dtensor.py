"""DTensor to local tensor and back: the edge between distributed parameters and the plain tensors of the arithmetic.

torch.distributed.tensor takes half a second to import, and a process that has not imported it has no DTensor: so it is
looked up, never imported.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether a tensor is distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def localise(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of a tensor, sharded as the parameter is."""
    if not is_dtensor(param):
        return local(tensor)
    if not is_dtensor(tensor):
        raise ValueError(
            f"got a plain tensor of shape {tuple(tensor.shape)} for a parameter that is a DTensor with placements "
            f"{param.placements}: pass a DTensor, for example by torch.distributed.tensor.distribute_tensor"
        )
    if tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    return tensor.to_local()


def shard(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, cut as the parameter is. No communication."""
    if not is_dtensor(param):
        return tensor
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return local(distribute(tensor, param.device_mesh, param.placements, src_data_rank=None))


def shards(param: Tensor) -> int:
    """The number of different parts that the parameter is cut into: 1 for a plain tensor."""
    count = 1
    if is_dtensor(param):
        for dim, placement in enumerate(param.placements):
            count *= param.device_mesh.size(dim) if placement.is_shard() else 1
    return count


def shard_index(param: Tensor) -> int:
    """Which of the :func:`shards` this rank holds: the same number on ranks that hold the same part."""
    index = 0
    if is_dtensor(param):
        for dim, placement in enumerate(param.placements):
            if placement.is_shard():
                index = index * param.device_mesh.size(dim) + param.device_mesh.get_local_rank(dim)
    return index
