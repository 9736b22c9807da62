"""Between a live model with its optimizers and the plain tensors of a checkpoint, on any number of ranks.

A checkpoint holds whole tensors, whoever wrote it: DTensors are gathered when it is taken and cut again when it is
loaded, so that one number of ranks can go on where another stopped.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sophia.distributed import World
from sophia.optimizers import Optimizers
from sophia.state_tree import decoded, encoded

# The head is the embedding: one matrix under two names.
_TIED = "head.weight"
_GROUP_KEYS = ("params", "param_names")


def take(
    model: nn.Module, optimizers: Optimizers, here: World
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
    """Copy weights, optimizer tensors and optimizer settings to the CPU.

    All ranks call it; the tensors are on rank 0 only, and empty dicts elsewhere.

    Raises:
        ValueError: A foreign optimizer keeps something that a checkpoint cannot hold.
    """
    weights, tensors, settings = {}, {}, []
    whole = functools.partial(_whole, keep=here.main)
    for name, value in plain_names(model.state_dict()).items():
        if name != _TIED:
            weights[name] = whole(value)
    names = _names_by_parameter(model)
    for number, part in enumerate(optimizers.parts):
        saved_dict = part.state_dict()  # complete on every rank; `part.state` of SophiaK is not, on shards
        own_state = _by_parameter(part, saved_dict["state"])
        others = _take_state(
            part, own_state, f"{number}/", names, lambda place, value: tensors.update({place: whole(value)})
        )
        _check_plain(part, saved_dict)
        groups = []
        # The settings from the state dict: it knows the time where a GPU may have skipped steps.
        for group, saved in zip(part.param_groups, saved_dict["param_groups"], strict=True):
            kept = {key: value for key, value in saved.items() if key not in _GROUP_KEYS}
            own = [names[parameter] for parameter in group["params"]]
            plain = {name: others[name] for name in own if name in others}
            groups.append({"names": own, "settings": kept, **({"state": plain} if plain else {})})
        settings.append(groups)
    if not here.main:
        return {}, {}, []
    return (
        {k: v for k, v in weights.items() if v is not None},
        {k: v for k, v in tensors.items() if v is not None},
        settings,
    )


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a model's parameters, sharded or not.

    Raises:
        ValueError: A name or shape does not fit.
    """
    parameters = {name: value for name, value in plain_names(model.state_dict()).items() if name != _TIED}
    for name in (*parameters, *weights):
        if name not in weights or name not in parameters or weights[name].shape != parameters[name].shape:
            found = list(weights[name].shape) if name in weights else "nothing"
            wanted = list(parameters[name].shape) if name in parameters else "nothing"
            raise ValueError(f"the weights do not fit the model: {name} is {found}, and the model wants {wanted}")
    for name, parameter in parameters.items():
        parameter.copy_(_placed(weights[name], parameter))


def load_optimizers(
    model: nn.Module, optimizers: Optimizers, tensors: Mapping[str, Tensor], settings: list[Any]
) -> None:
    """Give the optimizers the state of a checkpoint.

    Raises:
        ValueError: It is the state of other parameters.
    """
    names = _names_by_parameter(model)
    own = [[[names[p] for p in group["params"]] for group in part.param_groups] for part in optimizers.parts]
    if own != [[group["names"] for group in groups] for groups in settings]:
        raise ValueError(
            "the checkpoint's optimizer state belongs to other parameter groups; resume with the run's settings"
        )
    by_parameter: dict[tuple[int, str], dict[str, Tensor]] = {}
    for place, value in tensors.items():
        part_number, name, key = place.split("/", 2)
        by_parameter.setdefault((int(part_number), name), {})[key] = value
    for number, (part, groups) in enumerate(zip(optimizers.parts, settings, strict=True)):
        state: dict[int, dict[str, Any]] = {}
        index = 0
        merged = []
        for group, saved in zip(part.state_dict()["param_groups"], groups, strict=True):
            values = {
                key: tuple(value) if isinstance(value, list) else value for key, value in saved["settings"].items()
            }
            merged.append({**group, **values})
        for group, saved in zip(part.param_groups, groups, strict=True):
            for parameter in group["params"]:
                name = names[parameter]
                found = {key: _placed(value, parameter) for key, value in by_parameter.get((number, name), {}).items()}
                whole = _with_others(found, saved.get("state", {}).get(name, {}), f"{number}/{name}/")
                if whole:
                    state[index] = whole
                index += 1
        part.load_state_dict({"state": state, "param_groups": merged})
        _put_back(part, state)


def _by_parameter(part: torch.optim.Optimizer, saved: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The state of a state dict by parameter; under its own key what belongs to none."""
    parameters = dict(enumerate(parameter for group in part.param_groups for parameter in group["params"]))
    return {parameters.get(key, key): state for key, state in saved.items()}


def _take_state(
    part: torch.optim.Optimizer,
    states: Mapping[Any, dict[str, Any]],
    prefix: str,
    names: Mapping[Tensor, str],
    keep: Callable[[str, Tensor], None],
) -> dict[str, dict[str, Any]]:
    """Give all tensors to ``keep``; returns by parameter and key what is not a tensor, for JSON."""
    others: dict[str, dict[str, Any]] = {}
    for parameter, state in states.items():
        if parameter not in names:
            raise ValueError(
                f"{type(part).__name__} keeps state under {parameter!r}, which is no parameter: a checkpoint cannot "
                "hold it"
            )
        for key, value in state.items():
            place = f"{prefix}{names[parameter]}/{key}"
            if isinstance(value, Tensor):
                keep(place, value)
            else:
                others.setdefault(names[parameter], {})[key] = encoded(value, place, keep)
    return others


def _check_plain(part: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Refuse what a foreign optimizer's state dict has beside tensors and plain settings: it would be forgotten."""
    more = sorted(set(saved) - {"state", "param_groups"})
    if more:
        raise ValueError(f"the state dict of {type(part).__name__} has {more[0]!r}, which a checkpoint cannot hold")
    settings = [
        {key: value for key, value in group.items() if key not in _GROUP_KEYS} for group in saved["param_groups"]
    ]
    try:
        json.dumps(settings)
    except TypeError as problem:
        raise ValueError(
            f"the param groups of {type(part).__name__} have what a checkpoint cannot hold: {problem}"
        ) from None


def _with_others(found: dict[str, Tensor], trees: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A parameter's state: its tensors, but for those inside of other values, and these values."""
    used: set[str] = set()

    def find(place: str) -> Tensor:
        used.add(place.removeprefix(prefix))
        return found[place.removeprefix(prefix)]

    others = {key: decoded(tree, find) for key, tree in trees.items()}
    return {key: value for key, value in found.items() if key not in used} | others


def _put_back(part: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Undo what loading did to state: torch casts it to its parameter's dtype, and makes other texts of texts.

    A run must go on with the bits that it had. What the optimizer has dropped stays so: another rank holds it.
    """
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    for index, values in state.items():
        own = part.state[parameters[index]]
        for key, value in values.items():
            now = own.get(key)
            if key in own and not (isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype == value.dtype):
                own[key] = value


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP puts before them."""
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _names_by_parameter(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name.removeprefix("module.") for name, parameter in model.named_parameters()}


def _whole(value: Tensor, *, keep: bool) -> Tensor | None:
    """A copy of the whole tensor on the CPU; gathering is a collective call."""
    whole = value.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.to("cpu", copy=True).contiguous() if keep else None


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole CPU tensor as ``like`` is placed: this rank's part of it where that is a DTensor."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        # Every rank has the whole tensor and keeps its part: nothing is sent.
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device) if value.ndim else value
