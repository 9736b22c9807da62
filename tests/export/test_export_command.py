"""`sophia export`."""

import pytest
import torch
import transformers

from sophia import cli
from tests.export.runs import model_at, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return write_run(folder / "run", folder / "data")


def test_it_writes_what_transformers_loads(run, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "step 20, 0.01 M parameters, written to" in shown
    assert "transformers gives the same logits at 24 random tokens: largest difference" in shown
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        actual = transformers.AutoModelForCausalLM.from_pretrained(out)(tokens).logits
        torch.testing.assert_close(actual, model_at(20)(tokens)[..., :300], rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"


def test_an_older_checkpoint_unchecked_over_the_last_export(run, tmp_path, capsys):
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--no-check"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--checkpoint", "10", "--overwrite"]) == 0
    assert "not checked against transformers, as --no-check said" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.transformer.ln_f.weight, model_at(10).final_norm.weight)


def no_checkpoint(run):
    for checkpoint in (run / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()


def cut_weights(run):
    file = run / "checkpoints" / "step-00000020" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (None, ["--checkpoint", "3"], ["no checkpoint 3", "10, 20"]),
        (no_checkpoint, [], ["holds no checkpoint"]),
        (cut_weights, [], ["model.safetensors", "bytes instead of"]),
        (None, ["--out", "/dev/null/out"], ["/dev/null"]),
    ],
)
def test_user_errors_are_one_line_and_2(damage, arguments, words, tmp_path, capsys):
    run = write_run(tmp_path / "run", tmp_path / "data")
    if damage is not None:
        damage(run)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert cli.main(["export", str(run), *out, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sophia: ")
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err
    assert list(tmp_path.iterdir()) == [run]


def test_an_existing_folder_is_not_touched(run, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    for more in ([], ["--overwrite"]):
        assert cli.main(["export", str(run), "--out", str(tmp_path), *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "exists: name a new folder" in said or "is not an exported model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_it_is_no_run(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is not a run folder: it has no config.toml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
