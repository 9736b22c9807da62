"""The estimate of a step's peak, against PyTorch's own record of every allocation in the trainer's step."""

import contextlib
import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sophia.config import OPTIMIZERS, OptimizerSettings
from sophia.distributed import World
from sophia.memory import block_bytes, optimizer_bytes, step_memory
from sophia.model import GPT, GPTConfig
from sophia.optim import kernels
from sophia.optimizers import Optimizers
from sophia.presets import preset
from sophia.step import Stepper

SHAPE = {"vocab_size": 2048, "context": 64, "layers": 2, "heads": 4, "width": 128}
WORKSPACE = 8 << 20  # which no allocation of PyTorch's shows
SCRATCH = 1 << 20  # of Sophia's step on the CPU: too little to be estimated


def stepper_of(config, *, optimizer, rows, micro_batch, precision, **changes):
    model = GPT(config)
    recipe = dict(preset("gpt2-small").recipes[optimizer]) | changes
    if optimizer.startswith("sophia"):
        recipe |= {"curvature_rows": 4, "curvature_interval": 2}
        recipe |= {"curvature_chunks": 4} if optimizer != "sophia-h" else {}
    return Stepper(
        model=model,
        optimizers=Optimizers(OptimizerSettings(optimizer=optimizer, **recipe), model, seed=0),
        here=World(rank=0, size=1, device=torch.device("cpu")),
        rows=range(rows),
        total_rows=rows,
        micro_batch=micro_batch,
        max_grad_norm=1.0,
        seed=0,
        autocast=functools.partial(torch.autocast, "cpu", torch.bfloat16)
        if precision == "bf16"
        else contextlib.nullcontext,
    )


def recorded_peak(config, **settings):
    """Bytes of tensors alive at the worst moment of the third step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        stepper = stepper_of(config, **settings)
        tokens = torch.randint(0, config.vocab_size, (settings["rows"], config.context))
        for index in range(3):
            with record_function(f"@step {index}"):
                stepper.refresh(tokens, tokens)
                stepper.gradients(tokens, tokens, index=index)
                stepper.clip()
                stepper.optimizers.step()
    events = record.profiler.kineto_results.events()
    (third,) = (event for event in events if event.name() == "@step 2")
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        if event.start_ns() >= third.start_ns():
            peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({}, {"rows": 4}),
        ({}, {"precision": "bf16"}),
        ({}, {"optimizer": "lion"}),
        ({}, {"optimizer": "nadamw"}),
        ({}, {"optimizer": "signum"}),
        ({}, {"optimizer": "muon"}),
        ({}, {"optimizer": "soap"}),
        ({}, {"optimizer": "sophia-g"}),
        ({}, {"optimizer": "sophia-g", "precision": "bf16"}),
        ({}, {"optimizer": "sophia-h"}),
        ({}, {"optimizer": "sophia-k"}),
        ({}, {"optimizer": "sophia-k", "precision": "bf16"}),
        ({"vocab_size": 20000, "layers": 1, "context": 8}, {"optimizer": "sophia-k"}),  # AdamW's rule for the embedding
        ({"vocab_size": 64, "context": 8}, {"optimizer": "sophia-k"}),  # adding to the sums
        ({"vocab_size": 64, "context": 8}, {"optimizer": "sophia-k", "basis": "both"}),  # new bases
        ({"bias": True, "padded_vocab_size": 2176}, {}),
        ({"dropout": 0.1}, {}),
        ({"dropout": 0.1}, {"precision": "bf16"}),
        ({"activation_checkpointing": True}, {}),
        ({"activation_checkpointing": True}, {"precision": "bf16"}),
        ({"vocab_size": 64}, {}),  # a block's backward pass is the peak, not the loss
        ({"vocab_size": 64, "activation_checkpointing": True}, {}),
        ({"vocab_size": 20000, "layers": 1, "context": 8}, {}),  # the embedding's gradients are
    ],
)
def test_the_estimate_is_what_pytorch_records(model, settings, monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", {"cpu": 1 << 60})  # fused passes need less than is foretold
    config = GPTConfig(**{**SHAPE, **model})
    settings = {"optimizer": "adamw", "rows": 8, "micro_batch": 4, "precision": "fp32", **settings}
    by_mean = settings["optimizer"] == "sophia-h"
    estimate = step_memory(
        config,
        optimizer=settings["optimizer"],
        micro_batch=settings["micro_batch"],
        precision=settings["precision"],
        accumulates=settings["rows"] > settings["micro_batch"],
        curvature_rows=4 if by_mean else 1,
        curvature_chunks=1 if by_mean else 4,
        basis=settings.get("basis", "smaller"),
    )
    scratch = SCRATCH if settings["optimizer"].startswith("sophia") else 0
    if settings["optimizer"] == "sophia-k":  # of matrices alone
        scratch = min(scratch, 4 * 4 * config.width**2)
    assert estimate.live - WORKSPACE + scratch == pytest.approx(recorded_peak(config, **settings), rel=0.02)


@pytest.mark.parametrize("rows", [4, 8])
def test_curvature_needs_no_more_than_a_training_step(rows):
    """Sophia-G's refreshes, in four chunks, beside AdamW, which has as many averages."""
    adamw, sophia = (
        recorded_peak(GPTConfig(**SHAPE), optimizer=optimizer, rows=rows, micro_batch=4, precision="fp32")
        for optimizer in ("adamw", "sophia-g")
    )
    assert sophia <= adamw + SCRATCH + 4096


def test_a_refresh_begins_without_the_last_steps_gradients():
    stepper = stepper_of(GPTConfig(**SHAPE), optimizer="sophia-g", rows=4, micro_batch=4, precision="fp32")
    tokens = torch.randint(0, 2048, (4, 64))
    stepper.gradients(tokens, tokens, index=0)
    stepper.refresh(tokens, tokens)
    assert all(p.grad is None for p in stepper.model.parameters())


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_block_saves_what_the_table_says(low, dropout):
    """To the byte: what autograd keeps of one more block, beside parameters and their copies."""
    totals = []
    for layers in (1, 2):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**SHAPE, "layers": layers, "dropout": dropout}))
        seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
        kept = []

        def pack(tensor, seen=seen, kept=kept):
            kept.append(tensor.detach())  # so that no storage is handed out twice
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(torch.zeros(2, 64, dtype=torch.long))
        totals.append(sum(seen.values()))
    copies = 12 * 128**2 * 2 if low else 0
    config = GPTConfig(**SHAPE, dropout=dropout)
    assert totals[1] - totals[0] - copies == 2 * 64 * block_bytes(config, context=64, low=low, device="cpu")


@pytest.mark.parametrize(
    ("optimizer", "state_dtype", "basis"),
    [
        *((name, "fp32", None) for name in OPTIMIZERS),
        *((name, "bf16", None) for name in ("sophia-g", "sophia-k")),
        *(("sophia-k", "fp32", basis) for basis in ("both", "none")),
    ],
)
def test_optimizer_state_is_what_a_step_leaves(optimizer, state_dtype, basis):
    config = GPTConfig(**SHAPE)
    kept = {"state_dtype": state_dtype, "basis": basis}
    stepper = stepper_of(config, optimizer=optimizer, rows=4, micro_batch=4, precision="fp32", **kept)
    tokens = torch.randint(0, 2048, (4, 64))
    stepper.refresh(tokens, tokens)
    stepper.gradients(tokens, tokens, index=0)
    stepper.optimizers.step()
    states = [value for part in stepper.optimizers.parts for state in part.state.values() for value in state.values()]
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.numel() > 1)
    assert optimizer_bytes(config, optimizer, state_dtype, basis or "smaller") == held


def test_a_foreign_optimizer_is_taken_for_adamws_like():
    config = GPTConfig(**SHAPE)
    assert optimizer_bytes(config, "package.module:Class") == optimizer_bytes(config, "adamw")


def test_shards_and_buckets():
    """FSDP2 keeps a share of what has the size of the parameters; DDP all of it, and its buckets in every moment."""
    config = preset("gpt2-medium").config(50257)
    one, ddp, fsdp = (
        step_memory(
            config,
            micro_batch=1,
            optimizer="adamw",
            precision="bf16",
            device="cuda",
            accumulates=False,
            parallel=parallel,
            ranks=8,
        )
        for parallel in ("none", "ddp", "fsdp")
    )
    assert fsdp.parameters == one.parameters // 8
    assert fsdp.optimizer == one.optimizer // 8
    assert one.total <= ddp.total
    assert fsdp.total < ddp.total


def test_more_of_anything_never_needs_less():
    config = preset("micro").config(8192)

    def total(**settings):
        return step_memory(config, **{"micro_batch": 4, "optimizer": "sophia-g", **settings}).total

    assert total(micro_batch=8) > total() > total(micro_batch=2)
    assert total(context=128) < total()
    assert total(activation_checkpointing=True) < total()
    assert total(precision="bf16") < total()
    assert total(optimizer="lion") < total(optimizer="adamw") <= total()
    assert total(accumulates=False) < total()


def test_holes_are_the_cpus_alone():
    config = preset("micro").config(8192)
    estimates = {d: step_memory(config, micro_batch=4, optimizer="adamw", device=d) for d in ("cpu", "cuda", "mps")}
    assert estimates["cpu"].holes > 0
    assert estimates["cuda"].holes == estimates["mps"].holes == 0
    assert estimates["cpu"].total == estimates["cpu"].live + estimates["cpu"].holes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"context": 65}, "context is 65, longer than the 64 positions"),
        ({"ranks": 0}, "ranks is 0"),
        ({"optimizer": "adam"}, "optimizer 'adam' is unknown; choose from adamw, nadamw, lion"),
    ],
)
def test_steps_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        step_memory(GPTConfig(**SHAPE), **{"micro_batch": 1, "optimizer": "adamw", **settings})
