"""`sophia bench prepare`: that it measures what it says; how fast, no test says."""

import json

from sophia.cli import main


def test_it_times_both_sides_on_the_same_text(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--megabytes", "0.1", "--rounds", "2", "--tokenizer", "bpe:400", "--workers", "1"]
    assert main(["bench", "prepare", *arguments, "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert 100_000 <= result["text_bytes"] < 1_200_000
    assert result["tokens"] > result["text_bytes"] / 8
    assert set(result["results"]) == {"encode_batch", "encode_batch_fast", "sophia prepare"}
    assert result["results"]["encode_batch"]["ratio"] == 1.0
    for row in result["results"].values():
        assert row["megabytes_per_second"] > 0
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_nothing_to_time_is_refused(capsys):
    for setting in ("--rounds", "--megabytes"):
        assert main(["bench", "prepare", setting, "0"]) == 2
        assert f"{setting[2:]} is 0" in capsys.readouterr().err
