"""How tensors lie in memory."""

from collections.abc import Sequence

from torch import Tensor


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory exactly once: sorted by stride, each stride is the size below it."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape can be taken as flat vectors: no gaps, and one order of dimensions."""
    first = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    return all(tensor.stride() == first.stride() and dense(tensor) for tensor in tensors)
