"""`sophia sample`."""

import json
import sys

import pytest
import torch

from sophia import cli, sample_command
from sophia.export import export_model
from sophia.sample import generate
from tests.export.runs import END_OF_TEXT, model_at, write_run
from tests.export.small import TOKENIZERS, bpe, small_model

PROMPT = "thirty spoons"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return write_run(folder / "run", folder / "data")


def sample(capsys, *arguments):
    assert cli.main(["sample", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def likeliest(model, count):
    prompt = torch.tensor([bpe().encode(PROMPT).ids])
    ids = generate(model, prompt, count, temperature=0, stop_token=END_OF_TEXT)[0, prompt.shape[1] :].tolist()
    return [token for token in ids if token != END_OF_TEXT]


def test_it_writes_the_prompt_and_what_the_model_finds_likeliest(run, capsys):
    shown = sample(capsys, run, "--prompt", PROMPT, "--temperature", 0, "--max-tokens", 12)
    assert shown == PROMPT + bpe().decode(likeliest(model_at(20), 12), skip_special_tokens=False) + "\n"


def test_json_of_an_older_checkpoint(run, capsys):
    arguments = (run, "--prompt", PROMPT, "--temperature", 0, "--max-tokens", 12, "--checkpoint", 10, "--json")
    answer = json.loads(sample(capsys, *arguments))
    assert (answer["run"], answer["step"], answer["prompt"]) == (str(run), 10, PROMPT)
    (one,) = answer["samples"]
    assert one["tokens"] == likeliest(model_at(10), 12)
    assert one["text"] == bpe().decode(one["tokens"], skip_special_tokens=False)


def test_a_sample_is_a_function_of_its_seed_and_number(run, capsys):
    def texts(*arguments):
        words = (run, "--prompt", PROMPT, "--max-tokens", 10, "--temperature", 1.5, "--top-k", "None", "--json")
        return [one["text"] for one in json.loads(sample(capsys, *words, *arguments))["samples"]]

    three = texts("--samples", 3, "--seed", 7)
    assert texts("--samples", 2, "--seed", 7) == three[:2]
    assert len(set(three)) == 3
    assert texts("--seed", 8)[0] not in three
    assert texts("--seed", 7, "--top-k", 1) == texts("--seed", 8, "--temperature", 0)


def test_several_samples_are_told_apart(run, capsys):
    shown = sample(capsys, run, "--prompt", PROMPT, "--samples", 2, "--max-tokens", 3)
    assert "--- 1 of 2 ---\n" + PROMPT in shown
    assert "--- 2 of 2 ---\n" + PROMPT in shown


def test_the_prompt_may_be_in_a_file(run, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("grüner Tee\n", encoding="utf-8")
    words = ("--temperature", 0, "--max-tokens", 5)
    from_file = sample(capsys, run, "--prompt-file", tmp_path / "prompt.txt", *words)
    assert from_file == sample(capsys, run, "--prompt", "grüner Tee\n", *words)
    assert from_file.startswith("grüner Tee\n")


def ending_model(after):
    """A model that, whatever came before, writes "b" until position ``after`` and then ends the text."""
    model = small_model(vocab_size=257)
    tokens, width = model.tokens.weight, model.config.width
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks") and "output" in name:
                parameter.zero_()  # the stream is the embeddings alone
        model.final_norm.weight.fill_(1)
        tokens.zero_()
        tokens[ord("b"), :2] = torch.tensor([1e-3, 0])
        tokens[256, :2] = torch.tensor([0, 1e-3])
        model.positions.weight.zero_()
        model.positions.weight[:after, 0] = width
        model.positions.weight[after:, 1] = width
    return model


def test_it_stops_where_the_text_ends(tmp_path, capsys):
    tokenizer = TOKENIZERS["bytes"]()
    export_model(ending_model(5), tokenizer, tmp_path / "out", end_of_text=256, check=False)
    words = (tmp_path / "out", "--prompt", "ab", "--temperature", 0, "--max-tokens", 15)
    assert sample(capsys, *words) == "ab" + "bbbb" + "\n"
    (one,) = json.loads(sample(capsys, *words, "--json"))["samples"]
    assert one == {"text": "bbbb", "tokens": [ord("b")] * 4, "ended": True}


def test_a_character_comes_when_all_its_bytes_have(monkeypatch):
    """Each of these characters is two to four tokens; half of one is nothing to show, unless it is the last."""
    text = "aß🙂ü"
    ids = [*text.encode(), 0xC3]  # the last character never gets its second byte
    monkeypatch.setattr(sample_command, "stream", lambda *a, **k: (torch.tensor([token]) for token in ids))
    trained = sample_command.Trained(
        model=small_model(vocab_size=257),
        tokenizer=TOKENIZERS["bytes"](),
        end_of_text=256,
        step=None,
        data=None,
        eval_windows=None,
    )
    one = sample_command._Continuation(trained)
    settings = sample_command.SampleSettings(run="run", prompt="x")
    assert list(one.pieces([1], settings, 0)) == ["a", "ß", "🙂", "ü", "\ufffd"]
    assert (one.text, one.ids, one.ended) == (text + "\ufffd", ids, False)


def test_a_terminal_gets_no_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample_command._show("a\x1b[2Jb\n\tü\x07")
    assert capsys.readouterr().out == "a\ufffd[2Jb\n\tü\ufffd"


def test_a_model_folder_writes_as_the_run_does(run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), "--no-check"]) == 0
    capsys.readouterr()
    words = ("--prompt", PROMPT, "--max-tokens", 8, "--seed", 3)
    assert sample(capsys, tmp_path / "out", *words) == sample(capsys, run, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["the prompt is empty", "--prompt TEXT"]),
        ([], ["the prompt is empty"]),
        (["--prompt", "a", "--prompt-file", "b"], ["two prompts", "either"]),
        (["--prompt-file", "/nowhere"], ["/nowhere"]),
        (["--prompt", "a", "--temperature", "-0.5"], ["temperature is -0.5"]),
        (["--prompt", "a", "--temperature", "nan"], ["temperature is nan"]),
        (["--prompt", "a", "--top-k", "0"], ["top_k is 0"]),
        (["--prompt", "a", "--max-tokens", "0"], ["max_tokens is 0"]),
        (["--prompt", "a", "--samples", "0"], ["samples is 0"]),
        (["--prompt", "a", "--seed", "-1"], ["seed is -1"]),
        (["--prompt", "a", "--checkpoint", "15"], ["no checkpoint 15", "10, 20"]),
        (["--prompt", "a", "--device", "mps"], ["mps", "not available"]),
    ],
)
def test_user_errors_are_one_line_and_2(run, arguments, words, capsys):
    assert cli.main(["sample", str(run), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sophia: ")
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err


def test_a_prompt_file_of_other_bytes_is_one_line(run, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert cli.main(["sample", str(run), "--prompt-file", str(tmp_path / "prompt")]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_no_run(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_model_folder_has_no_checkpoints(tmp_path, capsys):
    export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0, check=False)
    assert cli.main(["sample", str(tmp_path / "out"), "--prompt", "a", "--checkpoint", "3"]) == 2
    assert "has no checkpoint 3" in capsys.readouterr().err
