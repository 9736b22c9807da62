"""Optimizers that are not ours, by import path: any `torch.optim.Optimizer`, and a hook for what a step of it needs.

    sophia train --optimizer package.module:Class --lr 1e-3 --arguments rank=4 --hook package.module:function

A hook is called as ``hook(context)`` before the gradients of every update, with a :class:`HookContext`. There an
optimizer that estimates curvature does so. What it leaves in `.grad` is dropped; the batch it must leave as it is. Its
time counts as training.

Everything that an optimizer changes must be in its `state_dict`, or a resumed run goes on as another one.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia.config import OptimizerSettings, nearest
from sophia.loss import CrossEntropy

Hook = Callable[["HookContext"], object]


@dataclass(frozen=True, kw_only=True)
class HookContext:
    """What a hook is given: the state before an update, and the batch that the update will learn from."""

    step: int
    """Updates done."""
    model: nn.Module
    """The model as the engine calls it: ids [rows, context] -> logits."""
    optimizer: torch.optim.Optimizer
    """The run's optimizer; the first of two with Muon."""
    inputs: Tensor
    """This rank's ids, [rows, context]. A hook that takes fewer rows at a time needs less memory."""
    targets: Tensor
    """The tokens that follow, [rows, context]."""
    autocast: Callable[[], AbstractContextManager[object]]
    """Makes the context of the run's forward passes."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of some rows, [rows, context, vocabulary with padding], in the run's precision."""
        with self.autocast():
            scores: Tensor = self.model(inputs)
        return scores

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some rows, a scalar."""
        with self.autocast():
            summed: Tensor = self.model(inputs, CrossEntropy(targets))
        return summed / targets.numel()


def load_hook(path: str) -> Hook:
    """The hook of an import path.

    Raises:
        ValueError: There is none.
    """
    found = _loaded(path, "hook")
    if not callable(found):
        raise ValueError(f"hook {path} is a {type(found).__name__}: it must be a function of one HookContext")
    hook: Hook = found
    return hook


def call_hook(hook: Hook, path: str, context: HookContext) -> None:
    """Call a hook.

    Raises:
        ValueError: It raised something.
    """
    with torch.enable_grad(), _told(f"hook {path} in step {context.step + 1}"):
        hook(context)


def build_foreign(settings: OptimizerSettings, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimizer of an import path.

    Args:
        settings: lr, weight_decay and beta1 with beta2 (as `betas`) become keywords of the constructor where they are
            given, `arguments` too.
        groups: As of `parameter_groups`.

    Raises:
        ValueError: There is no such class, it cannot be used, or does not take a setting.
    """
    path = settings.optimizer
    kind, keywords = constructor(settings)
    plain = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    with _told(f"optimizer {path}({', '.join(f'{name}={value!r}' for name, value in keywords.items())})"):
        built = kind(plain, **keywords)
    if "lr" not in built.defaults:
        raise ValueError(f"optimizer {path} keeps no lr in its param groups: the schedule could not change it")
    return built


def constructor(settings: OptimizerSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of an import path, and the keywords that it is called with.

    Raises:
        ValueError: There is no such class, it cannot be used, or does not take a setting.
    """
    path = settings.optimizer
    kind = _loaded(path, "optimizer")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {path} is no class of a torch.optim.Optimizer")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer {path} needs a closure in step(), which computes the loss anew: the trainer computes gradients "
            "once; choose another optimizer"
        )
    if callable(getattr(kind, "eval", None)):
        raise ValueError(
            f"optimizer {path} has eval(), so it evaluates other weights than it trains, and the trainer would "
            "evaluate and keep the wrong ones: choose one that leaves in the model what counts"
        )
    return kind, _keywords(settings, kind)


def step_foreign(part: torch.optim.Optimizer, path: str) -> None:
    """Take a step.

    Raises:
        ValueError: It raised something.
    """
    with _told(f"optimizer {path}.step()"):
        part.step()


def _keywords(settings: OptimizerSettings, kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    path, parameters = settings.optimizer, inspect.signature(kind).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    given: dict[str, tuple[str, Any]] = {"lr": ("lr", settings.lr)}  # keyword -> the setting that it comes from
    if settings.weight_decay is not None or settings.decay_by_name:
        name = "decay_by_name" if settings.weight_decay is None else "weight_decay"
        given["weight_decay"] = (name, settings.weight_decay or 0.0)
    betas = {"beta1": settings.beta1, "beta2": settings.beta2}
    one = next((name for name, beta in betas.items() if beta is not None), None)
    if one is not None:
        given["betas"] = (one, tuple(betas.values()))
    for text in settings.arguments:
        keyword, value = _argument(text)
        if keyword in given or keyword in ("lr", "params"):
            raise ValueError(f"arguments: {text!r} gives {keyword} a second time: it has a setting of its own")
        given[keyword] = (f"arguments: {keyword}", value)
    for keyword, (setting, _) in given.items():
        if keyword not in parameters and not takes_all:
            near = nearest(keyword, parameters)
            raise ValueError(
                f"{setting} has no meaning for {path}: its constructor takes no {keyword}{near}; leave it out"
            )
    if one is not None and None in betas.values():
        missing = "beta2" if one == "beta1" else "beta1"
        raise ValueError(f"{one} is given without {missing}: {path} takes both, as betas")
    return {keyword: value for keyword, (_, value) in given.items()}


def _argument(text: str) -> tuple[str, Any]:
    keyword, equals, value = text.partition("=")
    try:
        if not (equals and keyword.isidentifier()):
            raise ValueError
        return keyword, ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise ValueError(
            f"arguments: {text!r} is not KEY=VALUE with a Python literal as its value, such as rank=4, nesterov=True "
            "or \"mode='fast'\""
        ) from None


def _loaded(path: str, setting: str) -> Any:
    """What an import path names; the current folder is searched first, as `python -m` does it."""
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{setting} is {path!r}; an import path is package.module:name")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and f"{module_name}.".startswith(f"{missing.name}."):
            raise ValueError(
                f"{setting} {path}: there is no module {missing.name}: install it, or start where it lies"
            ) from None
        raise ValueError(f"{setting} {path}: its module needs {missing.name}, which is not installed") from missing
    except Exception as problem:
        raise ValueError(f"{setting} {path}: its module cannot be imported: {_in_a_line(problem)}") from problem
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        near = nearest(name, vars(module))
        raise ValueError(f"{setting} {path}: the module {module_name} has no {name}{near}") from None


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell a user in one line what somebody else's code raised in this block; its traceback stays attached."""
    try:
        yield
    except Exception as problem:
        raise ValueError(f"{what} raised {_in_a_line(problem)}") from problem


def _in_a_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"
