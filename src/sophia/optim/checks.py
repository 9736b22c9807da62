"""What a user may get wrong, said before anything is changed: the value, the reason, the remedy."""

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sophia.optim import kernels
from sophia.optim.clock import FIELDS
from sophia.optim.replicas import GRADIENT_REDUCTIONS
from sophia.optim.update import Path

P = ParamSpec("P")

# Clipped coordinates where gamma="auto" and nothing else is said: the middle of the paper's 10 to 50 % unclipped.
CLIP_TARGET = 0.7

PATHS = ("foreach", "fused", "capturable")  # settings of how a step is computed, not of what it computes

_FOREIGN = {
    "rho": "the official code's rho is gamma here (sophia.convert.from_official)",
    "clip_threshold": "the clip is at 1 here: sophia.convert gives lr, gamma, eps and weight_decay for another",
    "bs": "the batch factor is part of the curvature estimate, nothing has to be passed",
    "k": "it is called curvature_interval here",
    "interval": "it is called curvature_interval here",
    "hessian_interval": "it is called curvature_interval here",
    "update_period": "it is called curvature_interval here",
    "update_freq": "it is called curvature_interval here",
    "b1": "betas=(beta1, beta2) holds both decay rates",
    "b2": "betas=(beta1, beta2) holds both decay rates",
    "beta1": "betas=(beta1, beta2) holds both decay rates",
    "beta2": "betas=(beta1, beta2) holds both decay rates",
    "learning_rate": "it is called lr here",
    "wd": "it is called weight_decay here",
}


class UnknownKeywordError(TypeError, ValueError):
    """A keyword that the optimizer does not have."""


def explain_keywords(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor answer an unknown keyword with the right one."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                owner = type(args[0]).__name__
                raise UnknownKeywordError(f"{owner} has no setting {name!r}: {_hint(name, known)}")
        init(*args, **kwargs)

    return checked


def _hint(name: str, known: Sequence[str]) -> str:
    if name in _FOREIGN:
        return _FOREIGN[name]
    if name in PATHS:
        return "there is one path only; leave it out"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"


def check_clock(curvature_interval: int, seed: int) -> None:
    """Check the settings that hold for all groups."""
    if not is_whole(curvature_interval) or curvature_interval < 1:
        raise ValueError(f"curvature_interval={curvature_interval!r} must be a whole number of steps, at least 1")
    if not is_whole(seed) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")


def check_choices(gradient_reduction: str, state_dtype: torch.dtype | None, estimator: object) -> None:
    """Check settings that are a choice among few."""
    if gradient_reduction not in GRADIENT_REDUCTIONS:
        raise ValueError(
            f"gradient_reduction={gradient_reduction!r} must say what the engine does in backward: "
            f"{', '.join(map(repr, GRADIENT_REDUCTIONS))}"
        )
    if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
        raise ValueError(f"state_dtype={state_dtype!r} must be a floating point torch.dtype, or None for fp32")
    if estimator is not None and not callable(getattr(estimator, "estimate", None)):
        raise ValueError(
            f"estimator={estimator!r} has no estimate() method: give an instance, such as "
            "sophia.curvature.GaussNewtonBartlett()"
        )
    if isinstance(estimator, type):
        raise ValueError(f"estimator={estimator.__name__} is a class: give an instance, {estimator.__name__}()")


def check_group(group: dict[str, Any]) -> None:
    """Check the settings that a param group may have of its own."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: it must hold one number")
    _at_least_zero("lr", float(lr) if isinstance(lr, Tensor) else lr)
    _at_least_zero("gamma", group["gamma"], "or 'auto'")
    _at_least_zero("weight_decay", group["weight_decay"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be a pair (beta1, beta2)")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"betas={betas!r}: {name} must be at least 0 and less than 1")
    smallest = torch.finfo(torch.float32).tiny
    if not is_number(group["eps"]) or not smallest <= group["eps"] < math.inf:
        raise ValueError(
            f"eps={group['eps']!r} must be positive, at least {smallest:.2e}: below that fp32 has 0 / 0 where momentum "
            "and curvature vanish"
        )
    for name in ("maximize", "bias_correction"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name}={group[name]!r} must be True or False")
    target = group["clip_target"]
    if target is not None and not (is_number(target) and 0 < target < 1):
        raise ValueError(f"clip_target={target!r} must be a share of the coordinates, above 0 and below 1")
    if target is not None and group["capturable"]:
        raise ValueError(
            "gamma='auto' and capturable=True: a CUDA graph freezes γ, which has to follow the clipped fraction; give "
            "gamma a number, or leave capturable=False"
        )
    for name in PATHS:
        if group[name] is not None and not isinstance(group[name], bool):
            raise ValueError(f"{name}={group[name]!r} must be True, False or None")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach=True and fused=True ask for two paths at once: set one of them")


def resolved_gamma(
    gamma: Any, clip_target: float | None, *, start: float, fallback: float | None = None
) -> tuple[Any, float | None]:
    """γ to begin with, and the clipped fraction that it is to follow; None where γ stays as it is.

    Args:
        gamma: a number or "auto".
        clip_target: for "auto"; None is the fallback, or CLIP_TARGET.
        start: the γ of "auto" as long as there is no momentum.
        fallback: what holds for other groups.
    """
    if isinstance(gamma, str) and gamma == "auto":
        return start, next(target for target in (clip_target, fallback, CLIP_TARGET) if target is not None)
    if clip_target is not None:
        raise ValueError(f"clip_target={clip_target!r} has a meaning with gamma='auto' only: set that, or leave it out")
    return gamma, None


def _at_least_zero(name: str, value: object, alternative: str = "") -> None:
    if not is_number(value) or not 0 <= float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r} must be a finite number of at least 0 {alternative}".rstrip())


def is_number(value: object) -> bool:
    """Python's and numpy's numbers, but no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Python's and numpy's integers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_state_dict(
    loaded: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    check_settings: Callable[[dict[str, Any]], None],
    shapes: Callable[[Tensor, Mapping[str, Any]], Mapping[str, Sequence[int]]],
) -> None:
    """Check that a state dict fits the parameters; torch itself looks at the numbers of groups and parameters only.

    Args:
        loaded: the state dict.
        groups: of the optimizer.
        check_settings: refuses settings of a group that cannot work.
        shapes: of the tensors in a parameter's state, by name, under the settings of a group.
    """
    saved_groups = loaded["param_groups"]
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        return  # torch says so
    for saved, group in zip(saved_groups, groups, strict=True):
        if "rho" in saved and "clock" not in saved:
            raise ValueError(
                "the state dict has 'rho' in its param groups, so it is of the official SophiaG, whose hessian lacks "
                "the batch factor: load sophia.convert.official_state_dict(state_dict, predictions=..., bs=...)"
            )
        if "basis" in saved and "basis" not in group:
            raise ValueError(
                "the state dict is of SophiaK, whose curvature is measured in a basis of its own: load it into SophiaK"
            )
        own = ("params", *PATHS)  # how a step is computed stays as it is here, wherever the state dict was made
        merged = {name: value if name in own else saved.get(name, value) for name, value in group.items()}
        check_settings(merged)
        for index, p in zip(saved["params"], group["params"], strict=True):
            for name, shape in shapes(p, merged).items():
                value = loaded["state"].get(index, {}).get(name)
                if value is not None and tuple(value.shape) != tuple(shape):
                    raise ValueError(
                        f"{name} of parameter {index} in the state dict has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(p.shape)}: the state dict belongs to another model, or to another order of parameters"
                    )


def check_group_keys(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse settings that hold for all groups, and misspelt ones; other keys are the user's own business."""
    for name in group:
        if name in FIELDS:
            raise ValueError(
                f"{name!r} in a param group: there is one for all groups, which the optimizer keeps; "
                "pass it to the constructor"
                if name in ("curvature_interval", "seed")
                else f"{name!r} in a param group: the optimizer keeps its own there; use another name"
            )
        known = [*defaults, "params", "param_names"]
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if name in _FOREIGN or (near and not name.startswith(near[0])):
            raise ValueError(f"a param group has no setting {name!r}: {_hint(name, known)}")


def checked_params(params: ParamsT) -> ParamsT:
    """The parameters as a list where they come from an iterator, which may be found empty."""
    if isinstance(params, Tensor):
        return params  # torch says what is wrong with that
    listed = list(params)
    if not listed:
        raise ValueError(
            "the list of parameters is empty: pass model.parameters(), of a model that has some, and anew for each "
            "optimizer (a generator gives its items once)"
        )
    return listed  # type: ignore[return-value]


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse parameters that the rule has no meaning for."""
    for index, p in enumerate(params):
        if p.is_complex():
            raise ValueError(
                f"parameter {index} of shape {tuple(p.shape)} is {p.dtype}: the clip is per real coordinate, so give "
                "the optimizer a real parameter and let the model use torch.view_as_complex of it"
            )
        if not p.is_floating_point():
            raise ValueError(f"parameter {index} of shape {tuple(p.shape)} is {p.dtype}, which has no gradient")


def check_paths(group: dict[str, Any]) -> None:
    """Check that a path that was asked for can run where the parameters are."""
    if group["fused"] or group["capturable"]:
        for device_type in {p.device.type for p in group["params"]}:
            resolve_path(group, device_type)


def resolve_path(group: dict[str, Any], device_type: str, elements: int = 0) -> Path:
    """Which path a group's step takes for its parameters on such a device.

    Args:
        group: a param group.
        device_type: of some of its parameters.
        elements: how many the whole optimizer has: few do not earn back what it costs to compile a kernel.

    Raises:
        RuntimeError: the path asked for cannot run there.
    """
    if group["capturable"]:
        stands_in = (device_type == "cpu" and kernels.interpreted()) or torch.compiler.is_compiling()
        if device_type != "cuda" and not stands_in:
            raise RuntimeError(
                f"capturable=True needs CUDA, and there are parameters on {device_type}: leave it False, or move the "
                "model to CUDA before it is given to the optimizer"
            )
        if group["foreach"] is False and not group["fused"]:
            raise RuntimeError(
                "capturable=True and foreach=False: the path in slices reuses memory that a CUDA graph would have to "
                "own; leave foreach=None, which takes the fastest path there is"
            )
    if group["fused"]:
        problem = kernels.problem(device_type)
        if problem is not None:
            raise RuntimeError(f"fused=True cannot run: {problem}")
        return "fused"
    if group["foreach"] is not None:
        return "foreach" if group["foreach"] else "sliced"
    if group["fused"] is None and kernels.pays(device_type, elements) and kernels.problem(device_type) is None:
        return "fused"
    return "foreach" if device_type == "cuda" else "sliced"


def check_capture(group: dict[str, Any], holding: int) -> None:
    """Refuse to capture in a CUDA graph what would have to change later.

    Args:
        group: a param group.
        holding: how many of its parameters with gradients hold still because their curvature is not known.
    """
    if holding:
        raise RuntimeError(
            f"{holding} parameters have gradients, but no curvature yet, and would hold still for ever in a CUDA "
            "graph: refresh the curvature before the capture, with a forward() that uses them"
        )
    if isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu":
        raise RuntimeError(
            "lr is a tensor in main memory, whose value a CUDA graph would freeze: put it on the parameters' device"
        )


def check_gradients(params: Iterable[Tensor]) -> None:
    """Refuse sparse gradients before any parameter has moved."""
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which Sophia does not support: build "
                "the embedding with sparse=False"
            )


def check_estimates(estimates: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
    """Check curvature that a user hands over."""
    if isinstance(estimates, Tensor) or not isinstance(estimates, Sequence):
        raise ValueError(f"estimates is a {type(estimates).__name__}: give a list, one tensor or None a parameter")
    if len(estimates) != len(params):
        raise ValueError(
            f"got {len(estimates)} estimates for {len(params)} parameters: give one tensor or None for each, in the "
            "order of the param groups"
        )
    for index, (estimate, p) in enumerate(zip(estimates, params, strict=True)):
        if estimate is None:
            continue
        if not isinstance(estimate, Tensor):
            raise ValueError(f"estimate {index} is a {type(estimate).__name__}, not a tensor or None")
        if estimate.layout != torch.strided:
            raise ValueError(f"estimate {index} has layout {estimate.layout}: give a dense tensor, or None")
        if estimate.shape != p.shape:
            raise ValueError(
                f"estimate {index} has shape {tuple(estimate.shape)}, its parameter {tuple(p.shape)}: they must match"
            )
        if not estimate.is_floating_point():
            raise ValueError(f"estimate {index} is {estimate.dtype}: it must be floating point")


def check_attach(
    model: object,
    params: Sequence[Tensor],
    *,
    logits: object,
    mask: object,
    max_batch: object,
) -> None:
    """Check the arguments of attach()."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"attach() needs the model, an nn.Module, and got {type(model).__name__}")
    owned = set(model.parameters())
    if not any(p in owned for p in params):
        raise ValueError(
            "attach() got a model that has none of the optimizer's parameters: give the model that the optimizer was "
            "built from, or a wrapper of it"
        )
    if not is_whole(max_batch) or max_batch < 1:
        raise ValueError(f"max_batch={max_batch!r} must be a whole number of rows, at least 1")
    for name, function in (("logits", logits), ("mask", mask)):
        if function is not None and not callable(function):
            raise ValueError(f"attach({name}=...) must be a function, and is a {type(function).__name__}")


def checked_forwards(forward: object) -> list[Callable[[], Any]]:
    """The callables that a user handed to refresh_curvature."""
    if isinstance(forward, Tensor):
        raise ValueError(
            f"refresh_curvature got a tensor of shape {tuple(forward.shape)}: give a callable that computes it, "
            "refresh_curvature(lambda: model(inputs)), so that nothing is computed on steps that need no refresh"
        )
    if callable(forward):
        return [forward]
    if not isinstance(forward, Iterable):
        raise ValueError(f"refresh_curvature needs a callable or an iterable of them, and got {type(forward).__name__}")
    forwards = list(forward)
    if not forwards:
        raise ValueError("refresh_curvature got an empty iterable: give at least one callable")
    for index, item in enumerate(forwards):
        if not callable(item):
            raise ValueError(f"item {index} of the iterable is a {type(item).__name__}: each must be a callable")
    return forwards


def checked_rows(rows: object) -> Tensor | None:
    """The global row indices as int64 [rows], or None."""
    if rows is None:
        return None
    try:
        tensor = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(f"rows must be whole numbers, one global index a batch row: {problem}") from problem
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(
            f"rows is {tensor.dtype} of shape {tuple(tensor.shape)}: it must be one whole number a batch row, its "
            "index in the global batch"
        )
    return tensor.to(torch.int64)


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no entry is NaN or infinite. Waits for the device once."""
    verdicts = [torch.isfinite(extreme) for tensor in tensors for extreme in _extremes(tensor)]
    if not verdicts:
        return True
    device = verdicts[0].device
    return bool(torch.stack([verdict.to(device) for verdict in verdicts]).all())


def _extremes(tensor: Tensor | None) -> Iterator[Tensor]:
    # NaN and infinity show in the extremes: one pass and no temporary, where isfinite() would write a mask.
    if tensor is not None and tensor.numel() > 0:
        yield from torch.aminmax(tensor)
