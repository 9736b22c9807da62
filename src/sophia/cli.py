"""The command `sophia`: which subcommands there are, and how errors end.

A subcommand is a function of one frozen dataclass of settings, whose field docstrings are its --help; it is one line in
`_app`. It needs the extra "train", so it is imported only when the command line runs.
"""

import sys
from collections.abc import Sequence

from sophia import __version__

_USER_ERROR = 2
_INTERRUPTED = 130
_EXTRA = ("matplotlib", "numpy", "rich", "tokenizers", "tyro")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sophia ARGV` and return its exit code: 0, 2 after a user's error (one line on stderr), 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"sophia {__version__}")
        return 0
    try:
        _app(arguments)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] not in _EXTRA:
            raise
        return _refuse(f"the command line needs {missing.name}, which is not installed: pip install 'sophia-lm[train]'")
    except (ValueError, OSError) as problem:
        return _refuse(str(problem))
    except KeyboardInterrupt:
        print("sophia: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _app(arguments: list[str]) -> None:
    from tyro.extras import SubcommandApp  # noqa: PLC0415 - see above

    from sophia import bench, demo  # noqa: PLC0415

    benches = SubcommandApp()
    benches.command(name="step")(bench.step)
    app = SubcommandApp()
    app.command(name="demo")(demo.demo)
    app.command(benches, name="bench")
    app.cli(
        args=arguments,
        prog="sophia",
        description="Sophia pre-trains language models: an optimizer, and a fair race against AdamW.",
    )


def _refuse(message: str) -> int:
    print(f"sophia: {message}", file=sys.stderr)
    return _USER_ERROR
