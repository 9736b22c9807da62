"""What a run says of its batches is what it was given."""

import pytest

from sophia.data.loader import Prefetcher
from sophia.data.shards import Dataset
from sophia.guards import Signals
from sophia.study import one_run
from tests.study import tiny
from tests.train import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


def run(data, folder):
    fingerprint = Dataset.open(data).fingerprint
    return one_run.run(
        tiny.study(data), tiny.spec(), data=data, fingerprint=fingerprint, folder=folder, signals=Signals()
    )


@pytest.mark.parametrize("changed", [0, 10, 19])
def test_a_batch_that_is_spoilt_on_its_way_is_noticed(tmp_path, data, monkeypatch, changed):
    """The data is right, and so is what the seed asks for; what came is not."""
    honest, count = run(data, tmp_path / "honest"), 0
    own = Prefetcher.__next__

    def spoilt(self):
        nonlocal count
        inputs, targets = own(self)
        count += 1
        return (inputs, targets) if count != changed + 1 else (inputs, targets.flip(0))

    monkeypatch.setattr(Prefetcher, "__next__", spoilt)
    assert run(data, tmp_path / "spoilt").evidence.batches != honest.evidence.batches
    assert count == 20


def test_a_loop_that_begins_a_batch_late_is_noticed(tmp_path, data, monkeypatch):
    honest = run(data, tmp_path / "honest")
    own = Prefetcher.__init__
    monkeypatch.setattr(
        Prefetcher, "__init__", lambda self, batches, *, start, **rest: own(self, batches, start=start + 1, **rest)
    )
    assert run(data, tmp_path / "late").evidence.batches != honest.evidence.batches
