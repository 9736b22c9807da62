"""The text that a study makes for itself."""

import json
import shutil
from dataclasses import replace

import pytest

from sophia.study.settings import DataSettings
from sophia.study.text import open_text
from tests.study import tiny
from tests.train import runs


@pytest.fixture
def out(tmp_path):
    """A study's folder with text in it, as if from another tokenizer's run."""
    data = runs.write_data(tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["origin"] = {"sources": ["builtin"], "recipe": {"tokenizer": "bpe:300"}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "data.json").write_text(json.dumps({"text": "builtin", "fingerprint": "0" * 64}))
    return tmp_path


def study(tokenizer="bpe:300"):
    return replace(tiny.study(), data=DataSettings(tokenizer=tokenizer))


@pytest.mark.parametrize("make", [True, False])
def test_it_is_made_once(out, make):
    assert open_text(study(), out, make=make).origin == "builtin"


@pytest.mark.parametrize("make", [True, False])
def test_another_tokenizer_is_another_study(out, make):
    """The results would name a tokenizer that no run has seen."""
    with pytest.raises(ValueError, match=r"data.tokenizer is bpe:400, but the study in .* began with bpe:300: put it"):
        open_text(study("bpe:400"), out, make=make)


@pytest.mark.parametrize("make", [True, False])
def test_damage_names_what_to_delete(out, make):
    (out / "data" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not .*: delete .*data, and the same command does so"):
        open_text(study(), out, make=make)
    shutil.copytree(runs.write_data(out / "whole"), out / "data", dirs_exist_ok=True)
    (out / "data.json").write_text("{")
    with pytest.raises(ValueError, match=r"data.json is damaged .*: delete it, and the same command makes it again"):
        open_text(study(), out, make=make)


def test_a_report_makes_no_text(out):
    shutil.rmtree(out / "data")
    with pytest.raises(ValueError, match=r"is missing, .* without --report it is made again"):
        open_text(study(), out, make=False)
    assert not (out / "data").exists()
