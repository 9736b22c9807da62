"""The fused path on CUDA: one launch for all tensors of equal dtypes, by kernels in Triton.

Where the tensors are is told to the device once, and again only when an address has changed.

Triton comes with torch's CUDA builds. TRITON_INTERPRET=1 in the environment makes its interpreter run the same kernels
on CPU tensors, slowly: that is for tests.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophia.optim.kernels import interpreted
from sophia.optim.layout import flat_alike

# Elements of a program's tile, and its warps: 8 elements of each array a thread, in fp32 eight loads of 16 bytes before
# the first is needed. At 48 registers a thread ten programs share a multiprocessor, with 160 KB on their way: several
# times what the latency of an H200's memory asks for.
TILE = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # the latter is Triton's default, but 3.9 announces another

_KEPT = 32  # tables remembered: gradients may alternate between a few places
_LEAST_CAPABILITY = (8, 0)  # of bfloat16 conversions and of minima that keep a NaN
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

Columns: TypeAlias = Sequence[Sequence[Tensor]]


@functools.cache
def problem() -> str | None:
    """Why these kernels cannot run here, with the remedy; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing: install triton (torch's CUDA builds for Linux bring it), or leave fused=None"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here: leave fused=None"
    if torch.version.hip is not None:
        return "the Triton kernels were written for NVIDIA's GPUs and not tried on AMD's: leave fused=None"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and the kernels "
            f"need {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} or more: leave fused=None"
        )
    return None


def sophia_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    kept: dict[str, Any],
    clipped: Tensor | None,
    keys: Sequence[int] | None,
    step: int | Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> list[int]:
    """One step, in place; `update.sophia` says what the arguments are. Waits for nothing.

    Returns:
        The indices of the tensors that were left alone, because there is no kernel for them: fp64, and layouts that
        differ or leave gaps.
    """
    work = _tables(kept).find((params, grads, exp_avgs, hessians), keys)
    for launch in work.launches:
        stochastic = keys is not None and launch.dtypes[2] == "bfloat16"
        _run(
            "step_kernel",
            launch,
            clipped,
            found_inf,
            grad_scale,
            *_by_place(float, lr),
            *_by_place(_word, step if stochastic else 0),
            float(beta1),
            1.0 - beta1,
            float(gamma),
            float(eps),
            float(weight_decay),
            *map(_dtype, launch.dtypes),
            maximize,
            stochastic,
        )
    return work.left


def fold_(
    hessians: list[Tensor],
    estimates: list[Tensor],
    *,
    beta2: float,
    scale: float,
    kept: dict[str, Any],
    keys: Sequence[int] | None,
    step: int | Tensor,
) -> list[int]:
    """h ← β2 h + (1 − β2) · scale · ĥ, in place. Returns the indices of the tensors that there is no kernel for."""
    work = _tables(kept).find((hessians, estimates), keys)
    for launch in work.launches:
        stochastic = keys is not None and launch.dtypes[0] == "bfloat16"
        weights = float(beta2), (1.0 - beta2) * scale
        time = _by_place(_word, step if stochastic else 0)
        _run("fold_kernel", launch, *time, *weights, *map(_dtype, launch.dtypes), stochastic)
    return work.left


def floor_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], hessians: list[Tensor], *, kept: dict[str, Any]
) -> None:
    """The memory traffic of a step with next to no arithmetic, to measure the step against: θ and m become means."""
    work = _tables(kept).find((params, grads, exp_avgs, hessians), None)
    assert not work.left
    for launch in work.launches:
        _run("floor_kernel", launch, *map(_dtype, launch.dtypes))


def _tables(kept: dict[str, Any]) -> "Tables":
    if "cuda" not in kept:
        kept["cuda"] = Tables()
    tables: Tables = kept["cuda"]
    return tables


def _run(name: str, launch: "Launch", *arguments: object) -> None:
    device = launch.tensors.device
    # Triton launches on the current device, whatever the addresses are.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _kernel(name)[(launch.tiles,)](launch.tensors, launch.owners, *arguments, TILE, **OPTIONS)


def _by_place(convert: Callable[[Any], float], value: float | Tensor) -> tuple[float, Tensor | None]:
    """A number, and where to read it instead if it is on the device."""
    return (0, value) if isinstance(value, Tensor) else (convert(value), None)


class Launch(NamedTuple):
    """What a kernel needs to find tensors of equal dtypes."""

    dtypes: tuple[str, ...]
    """Of the arrays of a tensor, as Triton calls them."""
    tensors: Tensor
    """A row for each tensor, int64 on the device: see `triton_kernels`."""
    owners: Tensor
    """The tensor that each tile belongs to, int32 [tiles] on the device."""
    tiles: int
    """Programs to launch."""
    staging: Tensor
    """Where `tensors` was copied from: a CUDA graph copies it again at each replay."""


class Work(NamedTuple):
    """The launches for a list of tensors."""

    launches: list[Launch]
    left: list[int]
    """Indices of the tensors that there is no kernel for."""


class Tables:
    """Tells the device where the tensors of an optimizer are, and remembers what it has told."""

    def __init__(self) -> None:
        self._work: dict[tuple[object, ...], Work] = {}
        self._owners: dict[tuple[object, ...], Tensor] = {}
        self._spare: dict[int, Tensor] = {}  # pinned memory by rows: a capture is no time to ask for some
        self._captured: list[Work] = []

    def find(self, columns: Columns, keys: Sequence[int] | None) -> Work:
        """The launches for these tensors; columns[a][i] is array a of tensor i, keys[i] its key for rounding."""
        if columns[0] and _capturing(columns[0][0].device):
            # A table of its own, which no step outside the graph counts on: nothing is copied before the first replay.
            work = self._prepare(columns, keys, capturing=True)
            self._captured.append(work)  # as long as the graph may be replayed
            return work
        signature = _signature(columns, keys)
        known = self._work.get(signature)
        if known is None:
            _forget(self._work)
            known = self._work[signature] = self._prepare(columns, keys, capturing=False)
        return known

    def _prepare(self, columns: Columns, keys: Sequence[int] | None, *, capturing: bool) -> Work:
        groups: dict[tuple[str, ...], list[int]] = {}
        left: list[int] = []
        for index, arrays in enumerate(zip(*columns, strict=True)):
            if not flat_alike(arrays) or not all(array.dtype in _NAMES for array in arrays):
                left.append(index)
            elif arrays[0].numel() > 0:
                groups.setdefault(tuple(_NAMES[array.dtype] for array in arrays), []).append(index)
        launches = []
        for dtypes, indices in groups.items():
            chosen = [[column[index] for index in indices] for column in columns]
            launches.append(self._launch(dtypes, chosen, [keys[i] if keys else 0 for i in indices], capturing))
        return Work(launches, left)

    def _launch(self, dtypes: tuple[str, ...], columns: Columns, keys: Sequence[int], capturing: bool) -> Launch:
        device = columns[0][0].device
        tiles = [-(-tensor.numel() // TILE) for tensor in columns[0]]
        rows = torch.zeros(len(tiles), COLUMNS, dtype=torch.int64)
        for number, column in enumerate(columns):
            rows[:, number] = torch.tensor([tensor.data_ptr() for tensor in column])
        rows[:, SIZE] = torch.tensor([tensor.numel() for tensor in columns[0]])
        rows[1:, FIRST_TILE] = torch.tensor(tiles).cumsum(0)[:-1]
        rows[:, KEY] = torch.tensor(keys)
        owners = self._find_owners(tiles, device, capturing)
        staging = self._pin(rows, capturing) if device.type == "cuda" else rows
        return Launch(dtypes, staging.to(device, non_blocking=True), owners, sum(tiles), staging)

    def _find_owners(self, tiles: list[int], device: torch.device, capturing: bool) -> Tensor:
        known = (device, *tiles)
        if known not in self._owners:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and the optimizer has not stepped these parameters before: take "
                    "some steps (three, as torch's documentation advises) on a side stream before the capture"
                )
            owners = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), torch.tensor(tiles))
            if device.type == "cuda":
                owners = owners.pin_memory().to(device, non_blocking=True)
            _forget(self._owners)
            self._owners[known] = owners
        return self._owners[known]

    def _pin(self, rows: Tensor, capturing: bool) -> Tensor:
        """A copy in pinned memory, from which the device reads without anyone waiting."""
        staging = self._spare.pop(len(rows), None) if capturing else None
        if staging is None:
            staging = torch.empty_like(rows, pin_memory=True)
        if not capturing and len(rows) not in self._spare:
            _forget(self._spare)
            self._spare[len(rows)] = torch.empty_like(rows, pin_memory=True)
        return staging.copy_(rows)


# Columns of a table; `triton_kernels` has the same.
SIZE, FIRST_TILE, KEY, COLUMNS = 4, 5, 6, 8


def _forget(table: dict[Any, Any]) -> None:
    """Make room for one more entry."""
    while len(table) >= _KEPT:
        del table[next(iter(table))]


def _signature(columns: Columns, keys: Sequence[int] | None) -> tuple[object, ...]:
    """What a table depends on, asked for at every step.

    Memory that is freed and used again may hold another dtype or layout, so addresses do not say all; but state has the
    shape of its parameter, and lies where a new optimizer or `load_state_dict` has put it.
    """
    first, second, *state = columns
    return (
        *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in first],
        *[(t.data_ptr(), t.dtype, t.stride()) for t in second],
        *[(t.data_ptr(), t.dtype) for column in state for t in column],
        None if keys is None else tuple(keys),
    )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _word(step: int) -> int:
    """The low 32 bits, as the signed number that Triton passes as int32 whatever its size."""
    return (step + (1 << 31)) % (1 << 32) - (1 << 31)


@functools.cache
def _dtype(name: str) -> Any:
    return getattr(importlib.import_module("triton.language"), name)


@functools.cache
def _kernel(name: str) -> Any:
    return getattr(importlib.import_module("sophia.optim.kernels.triton_kernels"), name)
