"""`sophia bench memory --loss`: the chunked loss beside the plain one and beside torch's own in chunks.

Peak memory is measured in a process for each, at 8 x 1024 predictions of 50304 ids: of the loss with its gradients
alone, for hidden states of width 768, and of whole training steps. Time is taken where all three take turns.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sophia import machine, peak_memory
from sophia.loss import CrossEntropy, summed_cross_entropy
from sophia.model import GPT, GPTConfig

VOCAB, ROWS, WIDTH, SEQUENCES, CONTEXT = 50257, 50304, 768, 8, 1024
# GPT-2 small has 12 layers; a CPU would take minutes for them.
_LAYERS = {"cpu": 2, "cuda": 12}
_TIMED_PREDICTIONS = {"cpu": 1024, "cuda": SEQUENCES * CONTEXT}
_TIMED_ROUNDS = 4

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits: hidden [predictions, width], weight [ROWS, width], targets [predictions] -> their sum."""
    return F.cross_entropy(F.linear(hidden, weight, _padding(weight)), targets, reduction="sum")


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's loss in chunks, with its defaults."""
    return F.linear_cross_entropy(
        hidden,
        weight,
        targets,
        linear_bias=_padding(weight),
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(),
    )


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return summed_cross_entropy(hidden, weight, targets, VOCAB)


LOSSES: dict[str, Loss] = {"plain": plain_loss, "torch, chunked": torch_loss, "ours, chunked": chunked_loss}


def compare(device: str, console: Console) -> dict[str, Any]:
    """Measure all: {"memory": [{"what", "precision", "loss", "peak" (bytes)}], "seconds": {precision: {loss: […]}}}."""
    cases = [("loss alone", precision, loss) for precision in ("fp32", "bf16") for loss in LOSSES]
    cases += [("training step", "fp32" if device == "cpu" else "bf16", loss) for loss in ("plain", "ours, chunked")]
    described = "measuring memory in fresh processes"
    memory = [
        {"what": what, "precision": precision, "loss": loss, "peak": _measured(what, precision, loss, device)}
        for what, precision, loss in track(cases, description=described, console=console, transient=True)
    ]
    seconds = {precision: times(precision, torch.device(device)) for precision in ("fp32", "bf16")}
    return {
        "bench": "memory of the loss",
        "device": device,
        "machine": machine.describe(),
        "predictions": SEQUENCES * CONTEXT,
        "vocabulary": ROWS,
        "width": WIDTH,
        "layers_of_the_step": _LAYERS[device],
        "timed_predictions": _TIMED_PREDICTIONS[device],
        "memory": memory,
        "seconds": seconds,
    }


def times(precision: str, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each loss with its gradients, taking turns; the first turn warms up and is left out."""
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    inputs = _inputs(_TIMED_PREDICTIONS[device.type], device)
    for _ in range(1 + _TIMED_ROUNDS):
        for name, loss in LOSSES.items():
            begin = time.perf_counter()
            _run(loss, inputs, precision)
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - begin)
    return {name: taken[1:] for name, taken in found.items()}


def work(words: str) -> None:
    """The other process: run one case, and print its peak as JSON."""
    what, precision, name, kind = json.loads(words)
    device = torch.device(kind)
    if what == "training step":
        _training_step(GPTConfig(**{**_shape(device), "layers": 1, "width": 16, "heads": 2}), name, precision, device)()
        base = peak_memory.now(device)
        peak_memory.reset(device)
        step = _training_step(GPTConfig(**_shape(device)), name, precision, device)
        step()  # makes the optimizer's state
    else:
        _run(LOSSES[name], _inputs(64, device), precision)
        step = functools.partial(_run, LOSSES[name], _inputs(SEQUENCES * CONTEXT, device), precision)
        base = peak_memory.now(device)
        peak_memory.reset(device)
    step()
    print(json.dumps({"peak": peak_memory.peak(device) - base}))


def table(result: dict[str, Any]) -> Table:
    """What a person reads."""
    made = result["machine"]
    shown = Table(
        title=f"Loss of {result['predictions']} predictions, {result['vocabulary']} ids, width {result['width']}",
        caption=f"the training step has {result['layers_of_the_step']} layers; times are of "
        f"{result['timed_predictions']} predictions, median of {_TIMED_ROUNDS} turns; {made['gpu'] or made['cpu']}, "
        f"{made['threads']} threads, torch {made['torch']}",
    )
    for heading in ("", "loss"):
        shown.add_column(heading)
    for heading in ("peak, MiB", "of plain", "ms", "of plain"):
        shown.add_column(heading, justify="right")
    for row in result["memory"]:
        plain = next(r for r in result["memory"] if r["loss"] == "plain" and _case(r) == _case(row))
        taken = result["seconds"][row["precision"]]
        timed = row["what"] == "loss alone"
        own, base = statistics.median(taken[row["loss"]]), taken["plain"]
        shown.add_row(
            f"{row['what']}, {row['precision']}",
            row["loss"],
            f"{row['peak'] / 2**20:.0f}",
            f"{row['peak'] / plain['peak']:.2f}x",
            f"{own * 1e3:.0f}" if timed else "–",
            f"{_median_ratio(taken[row['loss']], base):.2f}x" if timed else "–",
        )
    return shown


def _case(row: dict[str, Any]) -> tuple[str, str]:
    return row["what"], row["precision"]


def _median_ratio(taken: Sequence[float], base: Sequence[float]) -> float:
    # Of each turn on its own: what slows the machine for a while slows all.
    return statistics.median(own / other for own, other in zip(taken, base, strict=True))


def _measured(*case: str) -> int:
    program = "import sys; from sophia.bench_memory_loss import work; work(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(case)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(
            f"the case {', '.join(case)} failed with exit code {done.returncode}; its own message is above"
        )
    found: int = json.loads(done.stdout.splitlines()[-1])["peak"]
    return found


def _inputs(predictions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(predictions, WIDTH, generator=draw).to(device).requires_grad_()
    weight = (torch.randn(ROWS, WIDTH, generator=draw) * 0.02).to(device).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (predictions,), generator=draw).to(device)


def _run(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], precision: str) -> None:
    hidden, weight, targets = inputs
    hidden.grad = weight.grad = None
    with _autocast(hidden.device, precision):
        total = loss(hidden, weight, targets) / len(targets)
    torch.autograd.backward(total)


def _shape(device: torch.device) -> dict[str, Any]:
    """Of GPT-2 small."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "padded_vocab_size": ROWS,
        "context": CONTEXT,
        "heads": 12,
        "width": WIDTH,
    }
    return {**shape, "layers": _LAYERS[device.type]}


def _training_step(config: GPTConfig, name: str, precision: str, device: torch.device) -> Callable[[], None]:
    """A step of AdamW, whose parameters, gradients and averages count."""
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(VOCAB, (SEQUENCES, CONTEXT), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(device, precision):
            if name == "plain":
                total = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum")
            else:
                total = model(ids, CrossEntropy(ids))
        torch.autograd.backward(total / ids.numel())
        optimizer.step()

    return step


def _padding(weight: Tensor) -> Tensor:
    ids = torch.arange(len(weight), device=weight.device)
    return weight.new_zeros(len(weight)).masked_fill_(ids >= VOCAB, -torch.inf)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
