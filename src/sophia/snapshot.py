"""Between a live model with its optimizers and the plain tensors of a checkpoint, on any number of ranks.

A checkpoint holds whole tensors, whoever wrote it: DTensors are gathered when it is taken and cut again when it is
loaded, so that one number of ranks can go on where another stopped.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sophia.distributed import World
from sophia.optimizers import Optimizers

# The head is the embedding: one matrix under two names.
_TIED = "head.weight"
_GROUP_KEYS = ("params", "param_names")


def take(
    model: nn.Module, optimizers: Optimizers, here: World
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
    """Copy weights, optimizer tensors and optimizer settings to the CPU.

    All ranks call it; the tensors are on rank 0 only, and empty dicts elsewhere.
    """
    weights, tensors, settings = {}, {}, []
    for name, value in plain_names(model.state_dict()).items():
        if name != _TIED:
            weights[name] = _whole(value, keep=here.main)
    names = _names_by_parameter(model)
    for number, part in enumerate(optimizers.parts):
        for parameter, state in part.state.items():
            for key, value in state.items():
                tensors[f"{number}/{names[parameter]}/{key}"] = _whole(value, keep=here.main)
        groups = []
        # The settings from the state dict: it knows the time where a GPU may have skipped steps.
        for group, saved in zip(part.param_groups, part.state_dict()["param_groups"], strict=True):
            kept = {key: value for key, value in saved.items() if key not in _GROUP_KEYS}
            groups.append({"names": [names[parameter] for parameter in group["params"]], "settings": kept})
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
        part_number, name, key = place.split("/")
        by_parameter.setdefault((int(part_number), name), {})[key] = value
    for number, (part, groups) in enumerate(zip(optimizers.parts, settings, strict=True)):
        state: dict[int, dict[str, Tensor]] = {}
        index = 0
        merged = []
        for group, saved in zip(part.state_dict()["param_groups"], groups, strict=True):
            values = {
                key: tuple(value) if isinstance(value, list) else value for key, value in saved["settings"].items()
            }
            merged.append({**group, **values})
        for group in part.param_groups:
            for parameter in group["params"]:
                found = by_parameter.get((number, names[parameter]), {})
                if found:
                    state[index] = {key: _placed(value, parameter) for key, value in found.items()}
                index += 1
        part.load_state_dict({"state": state, "param_groups": merged})


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
