"""Settings with nothing left open: what the preset, the data and the number of ranks decide."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sophia.config import OptimizerSettings, TrainSettings, check_positive
from sophia.data.shards import Dataset
from sophia.distributed import World
from sophia.import_hf import import_gpt2
from sophia.meaning import ESTIMATE, MATRIX_SETTINGS, check_meaning, estimates_curvature
from sophia.model import GPTConfig, padded_vocabulary
from sophia.optim import SophiaG, SophiaH, SophiaK
from sophia.optim.checks import CLIP_TARGET
from sophia.presets import CURVATURE_CHUNKS, Preset, default_curvature, paper_recipe, preset
from sophia.schedule import lr_factor
from sophia.trackers import check_trackers

# Every device gets the same padding, so that a checkpoint fits wherever it goes. A multiple of 64 serves tensor cores
# (50257 becomes the 50304 of the paper) and wastes little on a small vocabulary.
_VOCABULARY_MULTIPLE = 64
# A run is divided into so many parts by evaluations and checkpoints, which are neither too close nor too far.
_PARTS = 20
_SHORTEST_PART = 25
_LONGEST_PART = 500
_LEAST_EPS = torch.finfo(torch.float32).tiny
# What Sophia's rule leaves open, and no preset decides.
_OPEN: Mapping[str, Mapping[str, Any]] = {
    "sophia-g": {"eps": SophiaG.PAPER["eps"], "curvature_noise": "labels"},
    "sophia-h": {"eps": SophiaH.PAPER["eps"]},
    "sophia-k": {
        **MATRIX_SETTINGS,
        "eps": inspect.signature(SophiaK).parameters["eps"].default,
        "curvature_noise": "signs",
    },
}
# Where numbers must lie, section by section; NaN lies nowhere.
_RANGES: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "optimizer": {
        "lr": (lambda x: 0 < x < math.inf, "finite and above 0"),
        "beta1": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "beta2": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "weight_decay": (lambda x: 0 <= x < math.inf, "finite and at least 0"),
        "max_grad_norm": (lambda x: 0 <= x < math.inf, "finite and above 0, or 0 for any gradient"),
        "basis_interval": (lambda x: x >= 1, "at least 1"),
        "gamma": (lambda x: x == "auto" or 0 < x < math.inf, "finite and above 0, or auto"),
        "clip_target": (lambda x: 0 < x < 1, "above 0 and below 1"),
        "eps": (lambda x: _LEAST_EPS <= x < math.inf, f"finite and at least {_LEAST_EPS:.2e}, or fp32 has 0 / 0"),
        "curvature_interval": (lambda x: x >= 1, "at least 1"),
        "exponent": (lambda x: 0 <= x < math.inf, "finite and at least 0"),
        "nu": (lambda x: 0 <= x <= 1, "between 0 and 1"),
        "orthogonalize": (lambda x: x >= 0, "at least 1, or 0 for none"),
        "update_rms": (lambda x: 0 <= x < math.inf, "finite and above 0, or 0 for whatever it is"),
    },
    "schedule": {
        "final_lr_fraction": (lambda x: 0 <= x <= 1, "between 0 and 1"),
        "decay_fraction": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    },
    "batch": {"seed": (lambda x: 0 <= x < 2**64, "at least 0 and below 2**64")},
    "checkpoints": {"keep_every": (lambda x: x >= 0, "at least 1, or 0 to keep none for good")},
    "guards": {"spike_sigmas": (lambda x: x > 0, "above 0")},
}


def resolve(settings: TrainSettings, dataset: Dataset, here: World) -> TrainSettings:
    """Fill in what is open, and refuse what does not fit together.

    Raises:
        ValueError: A setting is out of its range, or does not fit the data, the model or the ranks.
    """
    base = preset(settings.model.model)
    settings = _with_model(settings, base)
    settings = _with_lengths(settings, base)
    settings = _with_optimizer(settings, base)
    _check(settings, dataset, here)
    return settings


def resolve_optimizer(settings: TrainSettings) -> TrainSettings:
    """What `resolve` fills in and refuses without data and ranks: the model's shape, the lengths and the optimizer.

    Raises:
        ValueError: A setting is out of its range, or has no meaning for this optimizer.
    """
    base = preset(settings.model.model)
    settings = _with_optimizer(_with_lengths(_with_model(settings, base), base), base)
    _check_ranges(settings)
    return settings


def model_config(settings: TrainSettings, dataset: Dataset) -> GPTConfig:
    """The model of resolved settings, with the data's vocabulary."""
    shape = settings.model
    assert shape.context is not None
    assert shape.layers is not None
    assert shape.heads is not None
    assert shape.width is not None
    return GPTConfig(
        vocab_size=dataset.vocab_size,
        padded_vocab_size=padded_vocabulary(dataset.vocab_size, _VOCABULARY_MULTIPLE),
        context=shape.context,
        layers=shape.layers,
        heads=shape.heads,
        width=shape.width,
        bias=shape.bias,
        dropout=shape.dropout,
        activation=shape.activation,
        attention_scale_by_layer=bool(shape.attention_scale_by_layer),
        activation_checkpointing=shape.activation_checkpointing,
    )


def rows_per_step(settings: TrainSettings) -> int:
    """Sequences in a global batch."""
    assert settings.batch.tokens_per_step is not None
    assert settings.model.context is not None
    return settings.batch.tokens_per_step // settings.model.context


def _with_model(settings: TrainSettings, base: Preset) -> TrainSettings:
    shape = settings.model
    if shape.init_from is None:
        open_fields = {
            name: getattr(base, name)
            for name in ("layers", "heads", "width", "context", "attention_scale_by_layer")
            if getattr(shape, name) is None
        }
        return replace(settings, model=replace(shape, **open_fields))
    config, _ = import_gpt2(shape.init_from, dropout=shape.dropout)
    taken = {name: getattr(config, name) for name in ("layers", "heads", "width", "context")}
    taken |= {name: getattr(config, name) for name in ("bias", "activation", "attention_scale_by_layer")}
    for name in ("layers", "heads", "width", "context"):
        asked = getattr(shape, name)
        if asked is not None and asked != taken[name]:
            raise ValueError(f"{name} is {asked}, but the model in {shape.init_from} has {taken[name]}: leave it out")
    return replace(settings, model=replace(shape, **taken))


def _with_lengths(settings: TrainSettings, base: Preset) -> TrainSettings:
    check_positive(settings.schedule, "steps")
    check_positive(settings.evaluation, "eval_interval", "eval_windows")
    check_positive(settings.checkpoints, "checkpoint_interval", "keep_last")
    check_positive(settings.logging, "log_interval")
    check_positive(settings.guards, "max_skipped_steps")
    check_positive(settings.batch, "tokens_per_step")
    steps = settings.schedule.steps or base.steps
    warmup = settings.schedule.warmup_steps
    if warmup is None:
        warmup = round(steps * base.warmup_steps / base.steps) if steps > 1 else 0
    every = min(max(_SHORTEST_PART, steps // _PARTS), _LONGEST_PART)
    return replace(
        settings,
        schedule=replace(settings.schedule, steps=steps, warmup_steps=warmup),
        batch=replace(settings.batch, tokens_per_step=settings.batch.tokens_per_step or base.tokens_per_step),
        evaluation=replace(settings.evaluation, eval_interval=settings.evaluation.eval_interval or every),
        checkpoints=replace(
            settings.checkpoints, checkpoint_interval=settings.checkpoints.checkpoint_interval or every
        ),
    )


def _with_optimizer(settings: TrainSettings, base: Preset) -> TrainSettings:
    chosen = settings.optimizer
    fields = {one.name for one in dataclasses.fields(chosen)}
    if chosen.is_foreign and chosen.lr is None:
        raise ValueError(f"lr is open, and no preset knows {chosen.optimizer}: give --lr")
    recipe = {} if chosen.is_foreign else base.recipes[chosen.optimizer]
    if chosen.recipe == "paper":
        recipe = {**recipe, **paper_recipe(chosen.optimizer, rows_per_step(settings))}
    assert recipe.keys() <= fields
    chosen = _filled(chosen, recipe)
    check_meaning(chosen)
    if chosen.optimizer in _OPEN:
        check_positive(chosen, "curvature_rows", "curvature_chunks")
        estimates = estimates_curvature(chosen.optimizer, vars(chosen))
        left_open = _OPEN[chosen.optimizer].items()
        chosen = _filled(chosen, {name: value for name, value in left_open if estimates or name not in ESTIMATE})
        if estimates:
            chosen = replace(chosen, **_curvature(rows_per_step(settings), chosen))
        chosen = _with_target(chosen)
    return replace(settings, optimizer=chosen)


def _filled(chosen: OptimizerSettings, values: Mapping[str, Any]) -> OptimizerSettings:
    """With these values where nothing was said."""
    return replace(chosen, **{name: value for name, value in values.items() if getattr(chosen, name) is None})


def _with_target(chosen: OptimizerSettings) -> OptimizerSettings:
    """What γ follows, if it does."""
    if chosen.gamma == "auto":
        return replace(chosen, clip_target=CLIP_TARGET) if chosen.clip_target is None else chosen
    if chosen.clip_target is not None:
        raise ValueError(
            f"clip_target is {chosen.clip_target}, but gamma {chosen.gamma} does not follow it: leave it out, or "
            "choose gamma auto"
        )
    return chosen


def _curvature(total: int, chosen: OptimizerSettings) -> dict[str, Any]:
    """Rows and chunks of an estimate, of so many sequences in a step."""
    rows = chosen.curvature_rows
    if rows is None:
        rows, _ = default_curvature(total)
        rows = min(total, max(rows, chosen.curvature_chunks or 0))  # a sequence for each chunk that was asked for
    if rows > total:
        raise ValueError(f"curvature_rows is {rows}, but a step has {total} sequences: choose at most that")
    if chosen.optimizer == "sophia-h":
        return {"curvature_rows": rows}
    chunks = chosen.curvature_chunks or min(CURVATURE_CHUNKS, rows)
    if chunks > rows:
        raise ValueError(f"curvature_chunks is {chunks}, more than the {rows} curvature_rows: choose at most that")
    return {"curvature_rows": rows, "curvature_chunks": chunks}


def _check(settings: TrainSettings, dataset: Dataset, here: World) -> None:
    batch, shape = settings.batch, settings.model
    assert batch.tokens_per_step is not None
    assert shape.context is not None
    if batch.tokens_per_step % shape.context:
        near = max(1, round(batch.tokens_per_step / shape.context)) * shape.context
        raise ValueError(
            f"tokens_per_step is {batch.tokens_per_step}, not a multiple of the context {shape.context}: "
            f"choose for example {near}"
        )
    if batch.micro_batch != "auto" and batch.micro_batch < 1:
        raise ValueError(f"micro_batch is {batch.micro_batch}; it must be at least 1, or auto")
    _check_ranges(settings)
    check_trackers(settings.logging.track)
    here.rows(rows_per_step(settings))
    model_config(settings, dataset)
    factor(settings, 0)


def _check_ranges(settings: TrainSettings) -> None:
    for section, ranges in _RANGES.items():
        for name, (inside, where) in ranges.items():
            value = getattr(getattr(settings, section), name)
            if value is not None and not inside(value):
                raise ValueError(f"{name} is {value}; it must be {where}")


def factor(settings: TrainSettings, step: int) -> float:
    """The schedule's factor on the peak learning rate for the update after ``step`` earlier ones."""
    plan = settings.schedule
    assert plan.steps is not None
    assert plan.warmup_steps is not None
    return lr_factor(
        plan.schedule,
        step,
        total_steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        final_fraction=plan.final_lr_fraction,
        decay_fraction=plan.decay_fraction,
    )
