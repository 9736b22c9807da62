"""Settings from TOML files: the same as from the dataclasses, and every mistake named."""

import dataclasses
from pathlib import Path

import pytest

from sophia.config import (
    CHANGEABLE,
    BatchSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
    differences,
    read_toml,
    write_toml,
)

FULL = TrainSettings(
    data=Path("data"),
    out=Path("out"),
    model=ModelSettings(model="micro", layers=3, dropout=0.1),
    optimizer=OptimizerSettings(optimizer="adamw", lr=1e-3, decay_by_name=("tokens.*=0", "*norm*=0.1")),
    batch=BatchSettings(micro_batch=4, seed=7),
)


@pytest.mark.parametrize("settings", [TrainSettings(), FULL], ids=["defaults", "full"])
def test_what_is_written_is_read_again(tmp_path, settings):
    write_toml(settings, tmp_path / "config.toml")
    assert read_toml(tmp_path / "config.toml") == settings


def test_numbers_keep_every_bit(tmp_path):
    settings = TrainSettings(optimizer=OptimizerSettings(lr=0.1 + 0.2, gamma=1e-300))
    write_toml(settings, tmp_path / "config.toml")
    assert read_toml(tmp_path / "config.toml").optimizer.lr == 0.1 + 0.2


def read(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return read_toml(path)


def test_whole_numbers_do_for_fractions(tmp_path):
    value = read(tmp_path, "[optimizer]\nlr = 1\n").optimizer.lr
    assert (value, type(value)) == (1.0, float)


MISTAKES = [
    ("[optimizer]\nlearning_rate = 1\n", ["unknown key learning_rate", "[optimizer]"]),
    ("[optimizer]\nwieght_decay = 1\n", ["wieght_decay", "did you mean weight_decay"]),
    ("[optimiser]\nlr = 1\n", ["optimiser", "did you mean optimizer"]),
    ("lr = 1\n", ["lr belongs into the table [optimizer]"]),
    ("[model]\nlr = 1\n", ["lr belongs into the table [optimizer]"]),
    ("optimizer = 'adamw'\n", ["optimizer is a table", "[optimizer]"]),
    ("[optimizer]\nlr = 'fast'\n", ["optimizer.lr is 'fast'", "must be a number"]),
    ("[optimizer]\nlr = true\n", ["optimizer.lr is True", "must be a number"]),
    ("[batch]\nseed = 1.5\n", ["batch.seed is 1.5", "whole number"]),
    ("[batch]\nmicro_batch = 'all'\n", ["batch.micro_batch is 'all'", "'auto'"]),
    ("[optimizer]\noptimizer = 'sofia'\n", ["'sofia'", "must be one of sophia-g", "lion"]),
    ("[logging]\ntrack = ['mlflow']\n", ["'mlflow'", "'tensorboard'"]),
    ("[model]\nbias = 1\n", ["model.bias is 1", "true or false"]),
    ("[model\n", ["is not a TOML file"]),
]


@pytest.mark.parametrize(("text", "parts"), MISTAKES, ids=[text.replace("\n", " ") for text, _ in MISTAKES])
def test_a_mistake_is_named_with_its_place(tmp_path, text, parts):
    with pytest.raises(ValueError, match=r"settings\.toml") as caught:
        read(tmp_path, text)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value).rstrip()


def test_differences_are_found_in_every_table():
    other = dataclasses.replace(FULL, batch=BatchSettings(micro_batch=8, seed=7), out=Path("elsewhere"))
    assert differences(FULL, other) == {"micro_batch": (4, 8), "out": (Path("out"), Path("elsewhere"))}


def test_field_names_are_unique_over_all_tables_because_they_are_flags():
    names = [
        one.name
        for section in dataclasses.fields(TrainSettings)
        if dataclasses.is_dataclass(section.default_factory)
        for one in dataclasses.fields(section.default_factory)
    ]
    assert len(names) > 40
    assert len(names) == len(set(names))
    assert set(names) | {"data", "out"} >= CHANGEABLE


def test_every_field_has_its_help():
    source = Path(__import__("sophia.config").config.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    for number, line in enumerate(lines):
        if (
            line.startswith("    ")
            and ": " in line
            and " = " in line
            and not line.startswith("     ")
            and '"' not in line[:6]
        ):
            name = line.split(":")[0].strip()
            if name.isidentifier() and "OmitArgPrefixes" not in line and "Any" not in line:
                assert lines[number + 1].strip().startswith('"""'), f"{name} has no help"
