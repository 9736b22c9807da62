"""docs/training.md: its settings are settings, its files and fields are those of a run."""

import re
from pathlib import Path

import pytest

from sophia.config import TrainSettings, differences, read_toml

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", FILES, ids=["all", "another optimizer"])
def test_the_example_file_is_read(tmp_path, block):
    (tmp_path / "settings.toml").write_text(block, encoding="utf-8")
    changed = differences(TrainSettings(), read_toml(tmp_path / "settings.toml"))
    written = re.findall(r"^(\w+) = ", block, re.MULTILINE)
    defaults = {"optimizer"}  # written out although it is the default
    assert set(written) == changed.keys() | defaults
