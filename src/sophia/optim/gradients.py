"""A backward pass that leaves every `.grad` as it was."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sophia.optim import fsdp


class GradientInPartsError(RuntimeError):
    """A backward pass accumulated into a parameter more than once."""


@contextlib.contextmanager
def isolated_gradients(params: Sequence[Tensor], output: Tensor) -> Iterator[None]:
    """Inside, `.grad` of the parameters and of all other leaves of output's graph starts as None; after it, as before.

    Parameters of *other* optimizers are leaves too: a backward pass for the curvature must not add to their gradients.
    """
    with set_aside((*params, *_graph_leaves(output), *fsdp.sharded_parameters())), fsdp.unreduced_set_aside():
        yield


@contextlib.contextmanager
def handed_over(params: Sequence[Tensor], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, a backward pass hands each parameter's gradient to take(index, gradient) once it is whole, and drops it.

    So the gradients of all parameters never exist together. The gradient may share its memory with others of the same
    pass and must not be changed.

    Raises:
        GradientInPartsError: a gradient came more than once, from the backward pass within a reentrant checkpoint.
    """
    seen: set[int] = set()

    def consume(index: int, param: Tensor) -> None:
        gradient, param.grad = param.grad, None
        if index in seen:
            raise GradientInPartsError
        seen.add(index)
        if gradient is not None:
            take(index, gradient)

    handles = [
        param.register_post_accumulate_grad_hook(functools.partial(consume, index))  # type: ignore[no-untyped-call]
        for index, param in enumerate(params)
        if param.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def set_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `.grad` of these tensors starts as None; after it, it is the object and has the values of before."""
    kept = [(leaf, leaf.grad, _values(leaf.grad)) for leaf in {id(leaf): leaf for leaf in leaves}.values()]
    for leaf, _, _ in kept:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad, values in kept:
            if grad is not None and values is not None:
                grad.data.copy_(values)
            leaf.grad = grad


def _values(grad: Tensor | None) -> Tensor | None:
    """A copy of a gradient that is a view of something larger, which a backward pass may overwrite.

    DDP with gradient_as_bucket_view keeps gradients in its communication buckets. The view itself is put back too: a
    loop may clear or clip its gradients through a flat buffer of its own.
    """
    return grad.detach().clone() if grad is not None and grad._is_view() else None


def _graph_leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a backward pass from output would accumulate into."""
    for node in graph_nodes(output):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable.is_leaf:
            yield variable


def graph_nodes(output: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every operation that a backward pass from output would run. Reentrant checkpoints hide what is inside them."""
    seen: set[torch.autograd.graph.Node] = set()
    open_nodes = [output.grad_fn] if output.grad_fn is not None else []
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        open_nodes.extend(parent for parent, _ in node.next_functions if parent is not None)
