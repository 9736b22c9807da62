"""The command `sophia`: which subcommands there are, and how errors end.

A subcommand is a function of one frozen dataclass of settings, whose field docstrings are its --help; it is one line in
`COMMANDS` or `BENCHES`. Its module is imported only when it is called: most of them need the extra "train".
"""

import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sophia import __version__

_USER_ERROR = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141
_TRAIN = ("matplotlib", "numpy", "rich", "safetensors", "tokenizers", "tomli", "tomli_w", "tyro", "zstandard")
_EXTRAS: Mapping[str, str] = {**dict.fromkeys(_TRAIN, "train"), "scipy": "study"}


class Command(NamedTuple):
    """One subcommand."""

    module: str
    """Where its function is."""
    function: str
    """Takes the settings; with `parses`, the list of arguments."""
    summary: str
    """One line for the list of subcommands."""
    parses: bool = False
    """Whether the function reads the arguments itself."""


COMMANDS: Mapping[str, Command] = {
    "demo": Command("sophia.demo", "demo", "a first race of Sophia-G against AdamW, offline, in minutes"),
    "prepare": Command("sophia.prepare", "run", "text into token shards, on all cores; or verify them"),
    "train": Command(
        "sophia.train_command", "main", "train a GPT-2, from its start or its last checkpoint", parses=True
    ),
    "eval": Command("sophia.eval_command", "evaluate_command", "loss, perplexity and bits per byte of a run"),
    "sample": Command("sophia.sample_command", "sample", "text from a trained model"),
    "export": Command("sophia.export_command", "export", "a folder that transformers loads"),
    "compare": Command("sophia.compare", "compare", "a fair race between optimizers, with statistics and a report"),
    "plan": Command(
        "sophia.plan", "plan", "what fits on which GPUs, how fast and how dear, before anything is started"
    ),
    "bench": Command("sophia.cli", "bench", "measurements, each against its yardstick in the same run", parses=True),
}
BENCHES: Mapping[str, Command] = {
    "step": Command("sophia.bench", "step", "the optimizer's step against torch's fused AdamW"),
    "update": Command("sophia.bench_update", "update", "each optimizer's update against a training step"),
    "train": Command("sophia.bench_train", "train", "training steps against transformers' GPT-2 with fused AdamW"),
    "memory": Command(
        "sophia.bench_memory", "memory", "peak memory of training steps against the estimate of sophia plan"
    ),
    "curvature": Command(
        "sophia.bench_curvature", "curvature", "cost of curvature estimates beside training, and their error"
    ),
    "loader": Command("sophia.bench_loader", "loader", "reading batches against the steps that consume them"),
    "prepare": Command("sophia.bench_prepare", "run", "text to shards against the tokenizer library's batches"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sophia ARGV` and return its exit code: 0, 2 after a user's error (one line on stderr), 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"sophia {__version__}")
        return 0
    try:
        _dispatch(
            arguments,
            COMMANDS,
            prog="sophia",
            about="Sophia pre-trains language models: an optimizer, a trainer, and a fair race against AdamW.",
        )
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        what = "the command line" if _EXTRAS[package] == "train" else f"sophia {arguments[0]}"
        return _refuse(f"{what} needs {package}, which is not installed: pip install 'sophia-lm[{_EXTRAS[package]}]'")
    except BrokenPipeError:  # the reader of our output, `head` for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (ValueError, OSError) as problem:
        return _refuse(str(problem))
    except KeyboardInterrupt:
        print("sophia: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def bench(arguments: Sequence[str]) -> None:
    """Run `sophia bench ARGUMENTS`."""
    _dispatch(
        arguments, BENCHES, prog="sophia bench", about="Measurements, each against its yardstick in the same run."
    )


def _dispatch(arguments: Sequence[str], commands: Mapping[str, Command], *, prog: str, about: str) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(commands, prog=prog, about=about), file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else _USER_ERROR)
    name, rest = arguments[0], list(arguments[1:])
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        raise ValueError(f"{prog} has no command {name!r}: {hint}")
    command = commands[name]
    function = getattr(importlib.import_module(command.module), command.function)
    if command.parses:
        function(rest)
        return
    import tyro  # noqa: PLC0415 - see above

    tyro.cli(function, prog=f"{prog} {name}", args=rest)


def _help(commands: Mapping[str, Command], *, prog: str, about: str) -> str:
    lines = [f"  {name:9} {command.summary}" for name, command in commands.items()]
    return "\n".join([f"usage: {prog} COMMAND …", "", about, "", *lines, "", f"{prog} COMMAND --help tells more."])


def _refuse(message: str) -> int:
    print(f"sophia: {message}", file=sys.stderr)
    return _USER_ERROR
