"""The command `sophia`: help, and how errors end."""

import builtins
import subprocess
import sys

import pytest

import sophia
from sophia import cli


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"sophia {sophia.__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "bench"]),
        (["demo", "--help"], ["--steps", "--sweep", "--out", "Updates of each run"]),
        (["bench", "step", "--help"], ["--rounds", "--device", "--json", "--out"]),
    ],
)
def test_help(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)


@pytest.mark.parametrize("arguments", [[], ["demo", "--stps", "3"], ["demo", "--steps", "many"], ["bench"]])
def test_unknown_words_end_with_2_and_help(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--steps", "0"], ["steps is 0", "at least 1"]),
        (["demo", "--width", "9", "--heads", "2"], ["width 9", "heads 2"]),
        (["demo", "--vocab-size", "7"], ["vocab_size is 7", "at least"]),
        (["demo", "--text-bytes", "10"], ["max_bytes 10"]),
        (["demo", "--out", "/dev/null/here"], ["/dev/null"]),
        (["bench", "step", "--rounds", "0"], ["rounds is 0", "at least 1"]),
        (["trian"], ["no command 'trian'", "did you mean train?"]),
        (["bench", "sleep"], ["sophia bench has no command 'sleep'", "step"]),
    ],
)
def test_user_errors_are_one_line_and_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("sophia: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        ("tyro", ["demo"], "the command line needs tyro, which is not installed: pip install 'sophia-lm[train]'"),
        ("scipy", ["compare"], "sophia compare needs scipy, which is not installed: pip install 'sophia-lm[study]'"),
    ],
)
def test_without_an_extra_it_names_it(missing, arguments, words, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for module in [name for name in sys.modules if name.startswith(("sophia.study", "sophia.compare"))]:
        monkeypatch.delitem(sys.modules, module)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"sophia: {words}\n"


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupt(*arguments, **names):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "sophia: interrupted\n"


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def broken(*arguments, **names):
        raise ModuleNotFoundError("No module named 'sophia.typo'", name="sophia.typo")

    monkeypatch.setattr(cli, "_dispatch", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_as_a_module():
    answer = subprocess.run([sys.executable, "-m", "sophia", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("sophia ")
