"""docs/studies.md: every key of a study file stands there with its default, and no other."""

import dataclasses
import re
import sys
from pathlib import Path

from sophia.study.settings import Ablation, DataSettings, Entry, RaceSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "studies.md").read_text(encoding="utf-8")


def rows(heading):
    """Key -> default as it stands there, of the first table below a heading."""
    section = PAGE.split(heading, 1)[1].split("\n\n|", 1)[1].split("\n\n", 1)[0]
    found = {}
    for keys, default in re.findall(r"^\| (`[^|]*`) \| ([^|]*?) ?\|", section, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([^`]*)`", keys), default)
    return found


def test_the_race_is_told_with_its_defaults():
    told = rows("`[race]`")
    assert list(told) == [one.name for one in dataclasses.fields(RaceSettings)]
    told.update(headline='`""`', headline_seeds="`[]`")  # in words on the page
    for one in dataclasses.fields(RaceSettings):
        if one.default is dataclasses.MISSING:
            assert told[one.name] == "", one.name
        else:
            default = tomllib.loads(f"key = {told[one.name].strip('`')}")["key"]
            assert (tuple(default) if isinstance(default, list) else default) == one.default, one.name


def test_the_data_is_told_with_its_defaults():
    told = rows("`[data]`")
    assert set(told) == {one.name for one in dataclasses.fields(DataSettings)}
    assert told["tokenizer"] == f'`"{DataSettings().tokenizer}"`'


def test_entries_and_ablations_are_told():
    names = {one.name for kind in (Entry, Ablation) for one in dataclasses.fields(kind)} - {"settings"}
    assert names <= set(re.findall(r"`([a-z_]+)`", PAGE.split("`[[optimizer]]`")[1]))


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]*)[^)]*\)", PAGE):
        assert (DOCS / link).exists(), link
