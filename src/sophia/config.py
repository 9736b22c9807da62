"""Settings of a training run: frozen dataclasses, a TOML file, the command line, and what is left open filled in.

A field that is None is decided by the preset of the model, the data or the machine (`resolve`); `config.toml` in a run
folder holds the settings with nothing left open, so it repeats the run wherever it is read.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w
import tyro

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OptimizerName = Literal["sophia-g", "sophia-h", "sophia-k", "adamw", "nadamw", "lion", "signum", "muon", "soap"]
OPTIMIZERS: tuple[str, ...] = typing.get_args(OptimizerName)
# What stands for all optimizers that are given by an import path.
FOREIGN = "package.module:Class"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model. What is left open comes from the preset."""

    model: str = "nano"
    """Preset: nano, micro, 30m, gpt2-small, gpt2-medium, 540m, gpt2-large or gpt2-xl."""
    layers: int | None = None
    """Transformer blocks."""
    heads: int | None = None
    """Attention heads in each block; must divide the width."""
    width: int | None = None
    """Size of the residual stream."""
    context: int | None = None
    """Tokens in a sequence."""
    bias: bool = False
    """Whether linear layers and LayerNorms carry a bias."""
    dropout: float = 0.0
    """Probability of zeroing an activation while training."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """GELU, exact or in the approximation of the original GPT-2."""
    attention_scale_by_layer: bool | None = None
    """Divide the attention scores of layer l (from 1) by l as well, as the paper does against blow-ups of deep models;
    open: as the preset has it."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    init_from: Path | None = None
    """Start from the weights of a Hugging Face GPT-2 folder, whose shape then replaces the preset's."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer. What is left open comes from the preset."""

    optimizer: str = "sophia-g"
    """Which rule updates the weights: sophia-g, sophia-h, sophia-k, adamw, nadamw, lion, signum, muon or soap; or
    package.module:Class, any torch.optim.Optimizer, with --lr. Sophia-K and Muon are for matrices inside blocks; the
    rest takes AdamW's rule."""
    recipe: Literal["preset", "paper"] = "preset"
    """Where settings come from that are left open: the preset, which may have found better ones for its size; or the
    Sophia paper, for sophia-g, sophia-h, adamw and lion, with the preset's learning rate."""
    lr: float | None = None
    """Peak learning rate."""
    beta1: float | None = None
    """Decay of the average of gradients."""
    beta2: float | None = None
    """Decay of the average of squared gradients; for Sophia of curvature estimates; Lion's second momentum."""
    weight_decay: float | None = None
    """Decoupled decay, times the learning rate, of all parameters with two dimensions or more."""
    decay_by_name: tuple[str, ...] = ()
    """Exceptions, as PATTERN=DECAY with shell wildcards on parameter names, for example 'tokens.*=0'; first match
    wins."""
    lr_by_name: tuple[str, ...] = ()
    """Exceptions, as PATTERN=FACTOR on the learning rate, for example 'tokens.*=0.5'; first match wins."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer; 0 leaves it as it is."""
    arguments: tuple[str, ...] = ()
    """Of package.module:Class: keywords of its constructor that have no setting here, as KEY=VALUE with Python
    literals, for example rank=4."""
    hook: str = ""
    """package.module:function, called with a sophia.foreign.HookContext before the gradients of every update."""
    basis_interval: int = 10
    """SOAP: steps from one eigenbasis to the next."""
    gamma: float | Literal["auto"] | None = None
    """Sophia: factor on the curvature; right when 10 to 50 percent of the coordinates are not clipped. auto sets it
    with every estimate anew, so that clip_target of them are clipped; not for Sophia-K."""
    clip_target: float | None = None
    """Sophia-G and -H with gamma auto: share of the coordinates to clip; open: 0.7."""
    eps: float | None = None
    """Sophia: least denominator of the update; open: 1e-12."""
    bias_correction: bool = False
    """Sophia-G and -H: make the average of curvature estimates whole from the first on, as AdamW does and Sophia-K
    always; the paper's grows from zero to half of its value in 69 estimates."""
    curvature_interval: int = 10
    """Sophia: steps from one curvature estimate to the next; for Sophia-K from one basis to the next, too."""
    refresh_when: Literal["before", "after"] = "before"
    """Sophia: estimate curvature before an update, from its batch; or after the one before that, from that one's batch
    at the new weights, as the authors' code does. The first estimate comes before the first update in any case."""
    curvature_rows: int | None = None
    """Sophia: sequences of the batch from which curvature is estimated; open: a sixteenth of them, or four where that
    is no more than a quarter, and one at least for each chunk that is asked for."""
    curvature_chunks: int | None = None
    """Sophia-G and -K: parts of those sequences whose sampled gradients are squared apart; more give less noise. Open:
    4, or as many as keep each within a micro-batch."""
    curvature_noise: Literal["labels", "signs"] | None = None
    """Sophia-G and -K: sampled labels as in the paper, or random signs through the output's curvature: less noise.
    Open: labels for Sophia-G, signs for Sophia-K."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Sophia: of momentum and curvature; bf16 takes 4 bytes a parameter instead of 8, rounded stochastically."""
    basis: Literal["both", "smaller", "none"] | None = None
    """Sophia-K: sides of a matrix that are turned into the curvature's basis; open: the smaller one."""
    factors: Literal["curvature", "gradients"] | None = None
    """Sophia-K: what the basis is made of, sampled curvature or the gradients of all steps; open: curvature."""
    diagonal: Literal["curvature", "gradients"] | None = None
    """Sophia-K: what a matrix's update is divided by in the basis, sampled curvature or an average of squared
    gradients; open: curvature."""
    exponent: float | None = None
    """Sophia-K: of that divisor; open: 0.5, as Adam's; 1 is Newton's, 0 none."""
    clip: bool | None = None
    """Sophia-K: clip coordinates in the basis; open: yes."""
    orthogonalize: int | None = None
    """Sophia-K: Newton-Schulz steps on a matrix's update, as Muon's; 0 for none. Open: 5."""
    update_rms: float | None = None
    """Sophia-K: root mean square of a matrix's update before the learning rate, 0 for whatever it is; open: 0.1,
    half of AdamW's or less."""
    nesterov: bool | None = None
    """Sophia-K: a step ahead with the momentum, for matrices inside blocks; open: yes."""
    others: Literal["gradients", "curvature"] | None = None
    """Sophia-K: what moves all other parameters, AdamW's rule (gradients) or Sophia-G's (curvature); open:
    gradients."""
    nu: float | None = None
    """Sophia-K: share of the momentum, beside this step's gradient, in AdamW's rule for all other parameters; 1 is
    AdamW's own. Open: 0.5."""
    split_qkv: bool | None = None
    """Sophia-K: turn and orthogonalize queries, keys and values, which are one weight, as three matrices; open: yes."""
    product_dtype: Literal["auto", "fp32", "bf16"] | None = None
    """Sophia-K: dtype of a step's products of matrices; bf16 is a multiple faster where the hardware has it, and auto
    takes it there (CUDA from Ampere on, CPUs with AMX). Open: auto."""

    def __post_init__(self) -> None:
        """Refuse a name that is none."""
        if self.optimizer not in OPTIMIZERS and not self.is_foreign:
            names = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer is {self.optimizer!r}; it must be one of {names}, or {FOREIGN}")

    @property
    def is_foreign(self) -> bool:
        """Whether the optimizer is given by an import path."""
        return ":" in self.optimizer


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How long, and how fast when."""

    steps: int | None = None
    """Updates; open: the preset's."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; wsd holds it and decays in the last part."""
    warmup_steps: int | None = None
    """Updates in which the learning rate climbs to its peak; open: the preset's share of the steps."""
    final_lr_fraction: float = 0.05
    """The last learning rate, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """For wsd: share of the steps in which the learning rate falls, at their end."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What an update learns from."""

    tokens_per_step: int | None = None
    """Predictions in an update, over all micro-batches and ranks; open: the preset's."""
    micro_batch: int | Literal["auto"] = "auto"
    """Sequences in one forward pass on one device; auto takes the largest that fits its memory."""
    seed: int = 0
    """Decides initial weights, the order of the data, dropout and curvature noise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Measuring on text that is never trained on."""

    eval_interval: int | None = None
    """Updates between evaluations; also one before the first and after the last. Open: a twentieth of the steps, 25
    to 500."""
    eval_windows: int = 256
    """Sequences of the validation split that are evaluated, always the same."""


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """What is written down."""

    log_interval: int = 10
    """Updates between lines of metrics.jsonl; losses stay on the device, and guards do not see them, until then."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that get the same numbers."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What can be resumed."""

    checkpoint_interval: int | None = None
    """Updates between checkpoints; also one after the last. Open: a twentieth of the steps, 25 to 500."""
    keep_last: int = 2
    """Checkpoints kept, newest first."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are never removed; 0 keeps none beyond the last."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What happens when numbers go wrong."""

    max_skipped_steps: int = 10
    """A non-finite loss or gradient leaves out its update at once; after so many in a row training stops when it logs,
    evaluates or saves next."""
    on_spike: Literal["report", "rollback"] = "report"
    """What follows a spike of the training loss when training logs, evaluates or saves next: a line, or a return to the
    last checkpoint before it, leaving out all batches since."""
    spike_sigmas: float = 8.0
    """Standard deviations above the recent mean that make a loss a spike, which must also be a tenth of a nat above."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """What it runs on. May differ when a run is resumed."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes under autocast and keeps weights in fp32; auto does so on CUDA."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto does so on CUDA where its compiler is at hand."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Under torchrun: a whole model on each rank (ddp); parameters, gradients and optimizer state in shards over all
    ranks (fsdp), or over the ranks of each node (hsdp)."""
    deterministic: bool = False
    """Deterministic kernels on CUDA, which a bitwise resume there needs; slower."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides a training run."""

    data: Path | None = None
    """Folder that sophia prepare wrote."""
    out: Path | None = None
    """Run folder to create."""
    model: tyro.conf.OmitArgPrefixes[ModelSettings] = field(default_factory=ModelSettings)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings] = field(default_factory=OptimizerSettings)
    schedule: tyro.conf.OmitArgPrefixes[ScheduleSettings] = field(default_factory=ScheduleSettings)
    batch: tyro.conf.OmitArgPrefixes[BatchSettings] = field(default_factory=BatchSettings)
    evaluation: tyro.conf.OmitArgPrefixes[EvaluationSettings] = field(default_factory=EvaluationSettings)
    logging: tyro.conf.OmitArgPrefixes[LoggingSettings] = field(default_factory=LoggingSettings)
    checkpoints: tyro.conf.OmitArgPrefixes[CheckpointSettings] = field(default_factory=CheckpointSettings)
    guards: tyro.conf.OmitArgPrefixes[GuardSettings] = field(default_factory=GuardSettings)
    machine: tyro.conf.OmitArgPrefixes[MachineSettings] = field(default_factory=MachineSettings)


# What a resumed run may change: nothing here changes what is learned, except by the order of floating-point sums.
CHANGEABLE = frozenset(
    {
        "data",  # the fingerprint decides whether it is the same
        "out",
        "micro_batch",
        "activation_checkpointing",
        "max_skipped_steps",
        *(
            one.name
            for section in (EvaluationSettings, LoggingSettings, CheckpointSettings, MachineSettings)
            for one in dataclasses.fields(section)
            if one.name not in ("precision", "eval_windows")
        ),
    }
)


def read_toml(path: Path) -> TrainSettings:
    """Settings from a TOML file with a table for each section: [model], [optimizer], …

    Raises:
        ValueError: The file is not TOML, or has a key or value that does not belong there.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give a TOML file of settings, as config.toml in a run folder"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is not a TOML file: {problem}") from None
    return from_mapping(content, origin=str(path))


def from_mapping(content: Mapping[str, Any], *, origin: str) -> TrainSettings:
    """Settings from nested tables; ``origin`` names them in errors."""
    return typing.cast("TrainSettings", build(TrainSettings, content, origin=origin))


def write_toml(settings: TrainSettings, path: Path) -> None:
    """Write all fields that are not None."""
    path.write_text(tomli_w.dumps(to_mapping(settings)), encoding="utf-8")


def to_mapping(settings: Any) -> dict[str, Any]:
    """Nested tables of all fields that are not None."""
    plain: dict[str, Any] = {}
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        if dataclasses.is_dataclass(value):
            plain[one.name] = to_mapping(value)
        elif value is not None:
            plain[one.name] = str(value) if isinstance(value, Path) else value
    return plain


def differences(old: TrainSettings, new: TrainSettings) -> dict[str, tuple[Any, Any]]:
    """Fields by name whose values differ: (old, new)."""
    flat_old, flat_new = _flat(old), _flat(new)
    return {name: (flat_old[name], flat_new[name]) for name in flat_old if flat_old[name] != flat_new[name]}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' (did you mean …?)', or nothing where no known name resembles this one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_positive(settings: Any, *names: str) -> None:
    """Refuse values below 1 of these fields; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _flat(settings: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        flat.update(_flat(value) if dataclasses.is_dataclass(value) else {one.name: value})
    return flat


def build(kind: Any, content: Mapping[str, Any], *, origin: str, table: str = "", root: type[Any] | None = None) -> Any:
    """A dataclass of settings from a TOML table.

    Args:
        kind: The dataclass; its fields may be dataclasses, which are tables of their own.
        content: The table.
        origin: The file, for errors.
        table: The table's name, for errors; empty: the whole file.
        root: The dataclass of the whole file, whose tables are searched for a key that stands in the wrong one; None is
            `kind`.

    Raises:
        ValueError: A key is unknown or missing, or a value of the wrong type.
    """
    root = root or kind
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            raise ValueError(_unknown(name, hints, origin=origin, table=table, root=root))
        place = f"{table}.{name}" if table else name
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{origin}: {place} is a table: write its keys below a line [{place}]")
            values[name] = build(hints[name], value, origin=origin, table=place, root=root)
        else:
            values[name] = converted(value, hints[name], f"{origin}: {place}")
    for one in dataclasses.fields(kind):
        if one.name not in values and one.default is one.default_factory is dataclasses.MISSING:
            is_table = dataclasses.is_dataclass(hints[one.name])
            where = f" in [{table}]" if table else ""
            raise ValueError(f"{origin}: no {f'table [{one.name}]' if is_table else one.name}{where}")
    try:
        return kind(**values)
    except ValueError as problem:
        raise ValueError(f"{origin}: {problem}") from None


def _unknown(name: str, hints: Mapping[str, Any], *, origin: str, table: str, root: type[Any]) -> str:
    fields = typing.get_type_hints(root)
    sections = {key: hint for key, hint in fields.items() if dataclasses.is_dataclass(hint)}
    for section, hint in sections.items():
        if section != table and name in typing.get_type_hints(hint):
            return f"{origin}: {name} belongs into the table [{section}]"
    known = list(hints) + [key for hint in sections.values() for key in typing.get_type_hints(hint)]
    return f"{origin}: unknown key {name}{f' in [{table}]' if table else ''}{nearest(name, known)}"


def converted(value: Any, hint: Any, place: str) -> Any:
    """The value as the field's type wants it; TOML has no paths, tuples or literals.

    Raises:
        ValueError: It is of another type; ``place`` names it.
    """
    kinds = _alternatives(hint)
    for kind in kinds:
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            return tuple(converted(item, typing.get_args(kind)[0], place) for item in value)
        if type(value) is (typing.get_origin(kind) or kind):
            return value
    wanted = " or ".join(_described(kind) for kind in kinds if kind is not types.NoneType)
    raise ValueError(f"{place} is {value!r}; it must be {wanted}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_described(typing.get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}.get(
        kind, str(kind)
    )
