"""A backward pass that leaves every `.grad` as it was."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sophia.optim import fsdp


@contextlib.contextmanager
def isolated_gradients(params: Sequence[Tensor], output: Tensor) -> Iterator[None]:
    """Inside, `.grad` of the parameters and of all other leaves of output's graph starts as None; after it, as before.

    Parameters of *other* optimizers are leaves too: a backward pass for the curvature must not add to their gradients.
    """
    leaves = {id(leaf): leaf for leaf in (*params, *_graph_leaves(output), *fsdp.sharded_parameters())}
    kept = [(leaf, _kept(leaf.grad)) for leaf in leaves.values()]
    for leaf, _ in kept:
        leaf.grad = None
    try:
        with fsdp.unreduced_set_aside():
            yield
    finally:
        for leaf, grad in kept:
            leaf.grad = grad


def _kept(grad: Tensor | None) -> Tensor | None:
    # DDP with gradient_as_bucket_view keeps gradients as views of its communication buckets, and the next backward
    # pass overwrites those: only a copy survives.
    if grad is None or not grad._is_view():
        return grad
    return grad.detach().clone()


def _graph_leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a backward pass from output would accumulate into."""
    seen: set[torch.autograd.graph.Node] = set()
    open_nodes = [output.grad_fn] if output.grad_fn is not None else []
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        open_nodes.extend(parent for parent, _ in node.next_functions if parent is not None)
