"""`sophia plan`: what fits, how fast and how dear, before anything is bought or started."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from sophia.accounting import count_parameters, curvature_share, flops_per_token, recomputed_flops_per_token
from sophia.config import OptimizerName
from sophia.gpus import find_gpu
from sophia.memory import MemoryEstimate as MemoryEstimate
from sophia.memory import optimizer_bytes as optimizer_bytes
from sophia.memory import step_memory as step_memory
from sophia.model import GPTConfig, padded_vocabulary
from sophia.presets import CURVATURE_INTERVAL, default_curvature, preset

_GIB = 2**30
_MULTIPLIERS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_VOCABULARY_MULTIPLE = 64
_MOST_GPUS = 1024
_MATRIX = 2048


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of `sophia plan`."""

    model: str = "gpt2-small"
    """Preset: nano, micro, 30m, gpt2-small, gpt2-medium, 540m, gpt2-large or gpt2-xl."""
    optimizer: OptimizerName = "sophia-g"
    """Which rule updates the weights; it decides the state to be kept."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Sophia: of momentum and curvature; bf16 takes 4 bytes a parameter instead of 8."""
    device: Literal["gpu", "cpu"] = "gpu"
    """GPUs, or this machine's processor."""
    gpus: int = 1
    """How many."""
    gpu: str | None = None
    """Which kind: b200, h200, h100, h100-pcie, a100-80, a100-40, l40s, a6000, a10, l4, 4090 or 3090. Open: h100."""
    memory_gb: float | None = None
    """Memory of one GPU, in GiB, in place of the table's; for the CPU of the process. Open on the CPU: what is free."""
    peak_tflops: float | None = None
    """Peak of one GPU in 10¹² operations a second, in place of the table's. Open on the CPU: a matrix product is timed
    now."""
    headroom: float = 0.1
    """Share of the memory to leave free, for what the estimate does not count (CUDA's context, fragments)."""
    micro_batch: int | None = None
    """Sequences in one forward pass on one GPU. Open: the largest that fits and divides a GPU's share of the step."""
    context: int | None = None
    """Tokens in a sequence; open: the preset's."""
    vocab_size: int = 50257
    """Token ids; the model pads them to a multiple of 64."""
    tokens_per_step: int | None = None
    """Predictions in an update; open: the preset's."""
    tokens: str | None = None
    """Training tokens, such as 500M or 50B; open: the preset's steps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 computes under autocast, with weights in fp32. auto: bf16 on GPUs, fp32 on the CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """A whole model on each GPU, or its parameters, gradients and optimizer state in shards."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again."""
    utilisation: float = 0.4
    """Share of the peak that training reaches; 0.4 is a guess. `sophia bench train` measures yours."""
    price_per_gpu_hour: float | None = None
    """In any currency."""
    json: bool = False
    """Print the answer as JSON instead of tables."""

    def __post_init__(self) -> None:
        """Refuse what cannot be planned, each with its remedy."""
        counts = ("gpus", "micro_batch", "context", "tokens_per_step", "vocab_size")
        for name in (*counts, "memory_gb", "peak_tflops", "utilisation"):
            value = getattr(self, name)
            least = "at least 1" if name in counts else "positive"
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} is {value}; it must be {least}")
        if self.utilisation > 1:
            raise ValueError(f"utilisation is {self.utilisation}; it is a share of the peak and at most 1, such as 0.4")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom is {self.headroom}; it is a share of the memory: at least 0 and below 1")
        price = self.price_per_gpu_hour
        if price is not None and not 0 <= price < math.inf:
            raise ValueError(f"price_per_gpu_hour is {price}; it must be at least 0")
        if self.device == "cpu" and (self.gpus > 1 or self.gpu is not None):
            raise ValueError("gpus and gpu have no meaning with --device cpu: leave them out, or --device")
        if self.state_dtype != "fp32" and not self.optimizer.startswith("sophia"):
            raise ValueError(f"state_dtype has no meaning for {self.optimizer}: leave it out, or choose sophia-g")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is planned, with nothing left open; one is made from another to see what a change brings."""

    config: GPTConfig
    optimizer: str
    device: Literal["cuda", "cpu"]
    gpus: int
    capacity: float
    """Bytes that one device may use."""
    rows: int
    """Sequences in a step, over all devices."""
    micro_batch: int
    precision: Literal["fp32", "bf16"]
    parallel: Literal["ddp", "fsdp"]
    state_dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def own_rows(self) -> int:
        """Sequences of a step on one device; the last one's share is smaller where they do not divide."""
        return -(-self.rows // self.gpus)

    @property
    def memory(self) -> MemoryEstimate:
        """The peak on one device."""
        curvature, passes = default_curvature(self.rows)
        if self.optimizer == "sophia-h":  # micro-batches of the mean
            rows = min(self.micro_batch, -(-curvature // self.gpus))
            passes = -(-curvature // (self.gpus * rows))
        else:
            rows = -(-curvature // (passes * self.gpus))
        return step_memory(
            self.config,
            micro_batch=self.micro_batch,
            optimizer=self.optimizer,
            precision=self.precision,
            device=self.device,
            accumulates=self.own_rows > self.micro_batch,
            curvature_rows=rows,
            curvature_chunks=passes,
            parallel=self.parallel if self.gpus > 1 else "none",
            ranks=self.gpus,
            state_dtype=self.state_dtype,
        )

    @property
    def fits(self) -> bool:
        """Whether the peak is within the capacity."""
        return self.memory.total <= self.capacity

    def changed(self, **changes: Any) -> "Setup":
        """The same but for these fields; `activation_checkpointing` and `context` are the model's."""
        model = {name: changes.pop(name) for name in ("activation_checkpointing", "context") if name in changes}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **model), **changes)

    def with_largest_micro_batch(self) -> "Setup":
        """With the largest micro-batch that divides a device's share of the step and fits, or else 1."""
        sizes = [size for size in range(self.own_rows, 0, -1) if self.own_rows % size == 0]
        setups = (self.changed(micro_batch=size) for size in sizes)
        return next((setup for setup in setups if setup.fits), self.changed(micro_batch=1))


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that makes a step smaller."""

    what: str
    """In words."""
    setup: Setup
    """With it."""


def plan(settings: Annotated[PlanSettings, tyro.conf.arg(name="")]) -> None:
    """Say what fits, how many tokens a second to expect, how many days and what it costs."""
    from sophia.plan_report import print_plan  # noqa: PLC0415 - it imports this module

    answer = make_plan(settings)
    if settings.json:
        print(json.dumps(answer))
    else:
        print_plan(answer, Console())


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """The whole answer, as it is printed with --json.

    Raises:
        ValueError: The model or the GPU is unknown, or settings do not fit each other.
    """
    setup = set_up(settings)
    changes = [] if setup.fits else list(remedies(setup))
    return {
        "settings": dataclasses.asdict(settings),
        "setup": {
            **{name: getattr(setup, name) for name in ("gpus", "micro_batch", "precision", "parallel", "rows")},
            "device": "CPU" if setup.device == "cpu" else _gpu_name(settings),
            "micro_batches_per_step": -(-setup.own_rows // setup.micro_batch),
            "model": dataclasses.asdict(setup.config),
        },
        "parameters": {**dataclasses.asdict(count := count_parameters(setup.config)), "total": count.total},
        "memory": _memory(setup),
        "fits": setup.fits,
        "changes": [
            {"what": change.what, "fits": change.setup.fits, "total": change.setup.memory.total} for change in changes
        ],
        "speed": _speed(settings, setup),
    }


def set_up(settings: PlanSettings) -> Setup:
    """Fill in what is open.

    Raises:
        ValueError: See :func:`make_plan`.
    """
    base = preset(settings.model)
    context = settings.context or base.context
    config = base.config(
        settings.vocab_size,
        context=context,
        padded_vocab_size=padded_vocabulary(settings.vocab_size, _VOCABULARY_MULTIPLE),
        activation_checkpointing=settings.activation_checkpointing,
    )
    tokens_per_step = settings.tokens_per_step or base.tokens_per_step
    unit = context * settings.gpus
    if tokens_per_step % unit:
        near = max(1, round(tokens_per_step / unit)) * unit
        raise ValueError(
            f"tokens_per_step is {tokens_per_step}, which {settings.gpus} GPUs cannot share in whole sequences of "
            f"{context} tokens: choose --tokens-per-step {near}, or another number of GPUs"
        )
    on_gpu = settings.device == "gpu"
    setup = Setup(
        config=config,
        optimizer=settings.optimizer,
        device="cuda" if on_gpu else "cpu",
        gpus=settings.gpus,
        capacity=_memory_bytes(settings) * (1 - settings.headroom),
        rows=tokens_per_step // context,
        micro_batch=settings.micro_batch or 1,
        precision=("bf16" if on_gpu else "fp32") if settings.precision == "auto" else settings.precision,
        parallel=settings.parallel,
        state_dtype=settings.state_dtype,
    )
    if setup.micro_batch > setup.own_rows:
        raise ValueError(
            f"micro_batch is {setup.micro_batch}, but each device has {setup.own_rows} sequences in a step: choose at "
            f"most that, or --tokens-per-step {setup.micro_batch * unit}"
        )
    return setup if settings.micro_batch else setup.with_largest_micro_batch()


def remedies(setup: Setup) -> Iterator[Change]:
    """What to change when a step does not fit, the cheapest first; each change alone, then all together."""
    if setup.micro_batch > 1:
        smaller = setup.with_largest_micro_batch()
        yield Change(what=f"--micro-batch {smaller.micro_batch}", setup=smaller)
    allowed: dict[str, Any] = {"micro_batch": 1}
    if not setup.config.activation_checkpointing:
        allowed["activation_checkpointing"] = True
        yield Change(what="--activation-checkpointing", setup=setup.changed(activation_checkpointing=True))
    if setup.parallel == "ddp" and setup.gpus > 1:
        allowed["parallel"] = "fsdp"
        yield Change(what="--parallel fsdp", setup=setup.changed(parallel="fsdp"))
    if setup.precision == "fp32":
        allowed["precision"] = "bf16"
        yield Change(what="--precision bf16", setup=setup.changed(precision="bf16"))
    if setup.optimizer.startswith("sophia") and setup.state_dtype == "fp32":
        allowed["state_dtype"] = "bf16"
        yield Change(what="--state-dtype bf16", setup=setup.changed(state_dtype="bf16"))
    half = setup.config.context // 2
    if half:
        shorter = setup.changed(context=half, rows=2 * setup.rows)
        yield Change(what=f"--context {half}", setup=shorter)
    together = setup.changed(**allowed).with_largest_micro_batch()
    yield Change(what=f"all but the context, --micro-batch {together.micro_batch}", setup=together)
    if setup.device == "cuda" and not together.fits:
        allowed["parallel"] = "fsdp"
        more = [gpus for gpus in (2**power for power in range(11)) if setup.gpus < gpus <= min(setup.rows, _MOST_GPUS)]
        larger = (setup.changed(**allowed, gpus=gpus) for gpus in more if setup.rows % gpus == 0)
        found = next((one for one in larger if one.fits), None)
        if found is not None:
            yield Change(what=f"all that and --gpus {found.gpus} --parallel fsdp", setup=found)


def _memory(setup: Setup) -> dict[str, Any]:
    estimate = setup.memory
    parts = {name: value for name, value in dataclasses.asdict(estimate).items() if name != "moment"}
    return {
        "per_gpu": {**parts, "total": estimate.total},
        "total": estimate.total * setup.gpus,
        "moment": estimate.moment,
        "usable_per_gpu": int(setup.capacity),
    }


def _speed(settings: PlanSettings, setup: Setup) -> dict[str, Any]:
    tokens_per_step = setup.rows * setup.config.context
    base = preset(settings.model)
    tokens = base.steps * base.tokens_per_step if settings.tokens is None else _parsed(settings.tokens)
    flops = flops_per_token(setup.config)
    rows_fraction = default_curvature(setup.rows)[0] / setup.rows
    work = flops * (1 + curvature_share(setup.optimizer, rows_fraction=rows_fraction, interval=CURVATURE_INTERVAL))
    if setup.config.activation_checkpointing:
        work += recomputed_flops_per_token(setup.config)
    peak, source = _peak_flops(settings, setup)
    tokens_per_second = setup.gpus * peak * settings.utilisation / work
    hours = tokens / tokens_per_second / 3600
    price = settings.price_per_gpu_hour
    return {
        "flops_per_token": flops,
        "flops_per_token_spent": work,
        "peak_flops_per_gpu": peak,
        "peak_source": source,
        "utilisation": settings.utilisation,
        "tokens_per_second": tokens_per_second,
        "seconds_per_step": tokens_per_step / tokens_per_second,
        "tokens": tokens,
        "steps": math.ceil(tokens / tokens_per_step),
        "days": hours / 24,
        "gpu_hours": hours * setup.gpus,
        "cost": None if price is None else hours * setup.gpus * price,
    }


def _memory_bytes(settings: PlanSettings) -> float:
    if settings.memory_gb is not None:
        return settings.memory_gb * _GIB
    if settings.device == "gpu":
        return find_gpu(settings.gpu or "h100").memory_gb * 0.99 * _GIB
    from sophia.micro_batch import free_memory  # noqa: PLC0415 - it imports this module

    free = free_memory()
    if free is None:
        raise ValueError("this system does not tell how much memory is free: give --memory-gb")
    return free


def _gpu_name(settings: PlanSettings) -> str:
    if settings.gpu is None and settings.memory_gb is not None and settings.peak_tflops is not None:
        return f"GPU of {settings.memory_gb:g} GiB"
    name = find_gpu(settings.gpu or "h100").name
    return name if settings.memory_gb is None else f"{name} with {settings.memory_gb:g} GiB"


def _peak_flops(settings: PlanSettings, setup: Setup) -> tuple[float, str]:
    """Peak operations a second of one device, and where the number is from."""
    if settings.peak_tflops is not None:
        return settings.peak_tflops * 1e12, "--peak-tflops"
    if settings.device == "gpu":
        gpu = find_gpu(settings.gpu or "h100")
        return (gpu.bf16_tflops if setup.precision == "bf16" else gpu.fp32_tflops) * 1e12, f"data sheet of {gpu.name}"
    return _measured_flops(
        torch.bfloat16 if setup.precision == "bf16" else torch.float32
    ), "a matrix product, timed now"


def _measured_flops(dtype: torch.dtype) -> float:
    """What this processor reaches in a product of square matrices: the best of some tries."""
    a = torch.randn(_MATRIX, _MATRIX).to(dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * _MATRIX**3 / best


def _parsed(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip().replace("_", ""), flags=re.IGNORECASE)
    tokens = float(match[1]) * _MULTIPLIERS[match[2].upper()] if match else 0
    if not 1 <= tokens < math.inf:
        raise ValueError(f"tokens is {text!r}; write a number of at least 1, with K, M, B or T behind it: 500M, 50B")
    return tokens
