"""What a study may not change once it has begun, and that one process at a time works on it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from sophia.occupied import occupied
from sophia.study import lock, read
from sophia.study.settings import Entry
from tests.study import tiny

DATA = "d" * 64


def take(folder, study, data=DATA, *, begun=True):
    return lock.take(folder, read.frozen(study), data, begun=begun)


def with_race(**changes):
    study = tiny.study()
    return replace(study, race=replace(study.race, **changes))


def with_baseline(**changes):
    study = tiny.study()
    first, *others = study.optimizers
    return replace(study, optimizers=(replace(first, **changes), *others))


def test_the_same_study_goes_on(tmp_path):
    take(tmp_path, tiny.study(), begun=False)
    content = (tmp_path / lock.FILE).read_bytes()
    take(tmp_path, tiny.study())
    assert (tmp_path / lock.FILE).read_bytes() == content


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (lambda: with_race(tokens=1280), "race.tokens is 1280, but"),
        (lambda: with_race(seeds=(1, 2, 3)), "race.seeds is [1, 2, 3]"),
        (lambda: with_race(warmup_fraction=0.2), "race.warmup_fraction is 0.2"),
        (lambda: replace(tiny.study(), model=replace(tiny.MODEL, width=32)), "model.width is 32, but"),
        (lambda: with_baseline(lr=0.5), "baseline.lr is 0.5"),
        (lambda: with_baseline(settings=(("beta1", 0.8),)), "baseline.settings.beta1 is 0.8, but"),
        (lambda: with_baseline(search=(("beta2", (0.9, 0.99)),)), "baseline.search.beta2"),
    ],
)
def test_a_frozen_key_is_named_with_both_values(tmp_path, study, words):
    take(tmp_path, tiny.study(), begun=False)
    with pytest.raises(ValueError, match="start a new study with another --out") as error:
        take(tmp_path, study())
    assert words in str(error.value)
    assert "began with" in str(error.value)


def test_other_entries_and_ablations_are_free(tmp_path):
    take(tmp_path, tiny.study(), begun=False)
    study = tiny.study(optimizers=("adamw", "lion", "muon"))
    take(tmp_path, replace(study, optimizers=(*study.optimizers, Entry(name="x", optimizer="lion", lr=1.0))))


def test_before_the_first_result_everything_is_free(tmp_path):
    take(tmp_path, tiny.study(), begun=False)
    take(tmp_path, with_race(tokens=1280), "e" * 64, begun=False)
    take(tmp_path, with_race(tokens=1280), "e" * 64)


def test_other_data(tmp_path):
    take(tmp_path, tiny.study(), begun=False)
    with pytest.raises(ValueError, match=r"the data changed: .* begins with dddddddddddd, now it is eeeeeeeeeeee: put"):
        take(tmp_path, tiny.study(), "e" * 64)


def test_a_missing_or_damaged_lock(tmp_path):
    with pytest.raises(ValueError, match=r"lock.json is missing, although runs are finished: put it back"):
        take(tmp_path, tiny.study())
    take(tmp_path, tiny.study(), begun=False)
    path = tmp_path / lock.FILE
    content = json.loads(path.read_text())
    content["frozen"]["race"]["tokens"] = 1280
    for broken in (json.dumps(content), "[]", "{", '{"format": 2}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"lock.json is damaged \(.*\): put it back"):
            take(tmp_path, tiny.study())


def _git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_whether_the_study_file_was_committed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    path = tmp_path / "study.toml"
    path.write_text("a = 1\n")
    assert lock.committed(None) is None
    assert lock.committed(path) is None
    _git(tmp_path, "init")
    assert lock.committed(path) is False
    _git(tmp_path, "add", "study.toml")
    assert lock.committed(path) is False
    _git(tmp_path, "commit", "-m", "a study")
    assert lock.committed(path) is True
    (tmp_path / "other").write_text("")
    assert lock.committed(path) is True
    path.write_text("a = 2\n")
    assert lock.committed(path) is False
    monkeypatch.setenv("PATH", "")
    assert lock.committed(path) is None


def test_it_is_noted_once_when_the_first_run_under_test_starts(tmp_path, monkeypatch):
    held = take(tmp_path, tiny.study(), begun=False)
    assert (held.tested, held.committed) == (False, None)
    monkeypatch.setattr(lock, "committed", lambda path: True)
    held = lock.note_test(tmp_path, held, tmp_path / "study.toml")
    assert (held.tested, held.committed) == (True, True)
    monkeypatch.setattr(lock, "committed", lambda path: False)
    again = lock.note_test(tmp_path, take(tmp_path, tiny.study()), tmp_path / "study.toml")
    assert (again.tested, again.committed) == (True, True)


def test_one_process_at_a_time(tmp_path):
    program = "import sys; from pathlib import Path; from sophia.occupied import occupied\n"
    program += "with occupied(Path(sys.argv[1]), 'the study is being advanced'): pass"
    with occupied(tmp_path, "the study is being advanced"):
        done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
        assert "is being advanced by process" in done.stderr
        assert "wait for its end" in done.stderr
    with occupied(tmp_path, "the study is being advanced"):
        pass


def test_a_lock_from_before_searches_had_a_budget(tmp_path):
    take(tmp_path, tiny.study(), begun=False)
    assert "search_budget" not in json.loads((tmp_path / lock.FILE).read_text())["frozen"]["race"]
    with pytest.raises(ValueError, match=r"race.search_budget is 0.5, but the study in .* began with nothing"):
        take(tmp_path, with_race(search_budget=0.5))
