"""Workers that die, fail, or are told to stop."""

import os
import signal
import time

import pytest

from sophia import checkpoint
from sophia.data.shards import Dataset
from sophia.study.pool import Pool
from sophia.study.worker import Failed, Finished, Job, Step, Stopped
from tests.study import tiny
from tests.train import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def pool(tmp_path, data):
    notes = []
    job = Job(
        study=tiny.study(data),
        data=data,
        fingerprint=Dataset.open(data).fingerprint,
        work=tmp_path / "work",
        threads=1,
    )
    pool = Pool(job, workers=1, note=notes.append)
    pool.notes = notes
    yield pool
    pool.stop()


def until(pool, kind, *, seconds=120.0):
    """What comes until a message of this kind does, that one last."""
    found = []
    end = time.monotonic() + seconds
    while not any(isinstance(message, kind) for message in found):
        assert time.monotonic() < end
        found += pool.wait(0.5)
    return found


def kill(pool):
    (worker,) = pool._workers
    os.kill(worker.process.pid, signal.SIGKILL)


def test_one_worker_through_errors_deaths_and_the_end(pool, tmp_path):
    """One process after the other, since each takes its time to start."""
    assert (pool.idle, pool.running) == (1, [])
    pool.start(tiny.spec("sophia-g", curvature_rows=100))
    assert pool.idle == 0
    failed = until(pool, Failed)[-1]
    assert "curvature_rows is 100" in failed.text
    assert failed.trace == ""

    pool.start(tiny.spec())  # the same process
    finished = until(pool, Finished)[-1]
    assert finished.run.spec == tiny.spec()
    folder = tmp_path / "work" / tiny.spec().id
    assert folder.is_dir()  # somebody has to note the result first
    pool.discard(tiny.spec())
    assert not folder.exists()

    long = tiny.spec(steps=100_000)
    pool.start(long)
    until(pool, Step)
    (worker,) = pool._workers
    assert pool.stop() == [Stopped(long.id)]  # at once, with a checkpoint
    assert not worker.process.is_alive()
    assert pool.running == []
    resumed = checkpoint.steps(tmp_path / "work" / long.id / "checkpoints")[-1]

    pool.start(long)
    assert until(pool, Step)[-1].step == resumed > 0
    kill(pool)
    until(pool, Step)
    assert len(pool.notes) == 1
    assert "exit code -9" in pool.notes[0]
    assert "it is started again" in pool.notes[0]
    assert pool.running == [long]
    kill(pool)
    failed = until(pool, Failed)[-1]
    assert failed.spec == long
    assert "exit code -9 (-9: killed, likely for want of memory), for the second time" in failed.text
    assert "fewer --workers" in failed.text
    assert pool.running == []
