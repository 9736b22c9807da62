"""The thread that reads ahead: in order, never too far, and it always ends."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from sophia.data.loader import Batches, Prefetcher
from tests.data.test_loader import Lines

CPU = torch.device("cpu")


def batches(tokens=1001):
    return Batches(Lines(tokens), context=10, rows=8, seed=0)


class Recorder(Batches):
    """Notes which steps were read, and can fail at one."""

    def __init__(self, *, fail_at=None, failure=None):
        super().__init__(Lines(), context=10, rows=8, seed=0)
        self.read, self.fail_at, self.failure = [], fail_at, failure

    def step(self, index, rows=None):
        if index == self.fail_at:
            raise self.failure
        self.read.append(index)
        return super().step(index, rows)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    deadline = time.monotonic() + 20
    while any(thread.name == "prefetcher" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a prefetcher's thread outlives it"
        time.sleep(0.01)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("rows", [range(8), range(4, 8), range(1, 8, 2)])
def test_it_gives_the_steps_in_order(depth, rows):
    source = batches()
    with Prefetcher(source, start=1_000_000, rows=rows, device=CPU, depth=depth) as prefetcher:
        for t in range(1_000_000, 1_000_030):
            inputs, targets = next(prefetcher)
            expected = source.step(t, rows)
            assert torch.equal(inputs, expected[0])
            assert torch.equal(targets, expected[1])


def test_it_reads_ahead_but_not_too_far():
    source = Recorder()
    with Prefetcher(source, start=10, rows=range(8), device=CPU, depth=3) as prefetcher:
        wait_until(lambda: source.read == [10, 11, 12])
        for _ in range(2):
            next(prefetcher)
        wait_until(lambda: len(source.read) == 5)
        time.sleep(0.05)
        assert source.read == [10, 11, 12, 13, 14]  # nothing before the start either


def test_it_can_be_iterated():
    with Prefetcher(batches(), start=0, rows=range(8), device=CPU) as prefetcher:
        firsts = [inputs for (inputs, _), _ in zip(prefetcher, range(5), strict=False)]
    assert all(torch.equal(a, batches().step(t)[0]) for t, a in enumerate(firsts))


@pytest.mark.parametrize("failure", [OSError("the disk is gone"), ValueError("wrong"), SystemExit(3)])
def test_exceptions_reach_the_consumer_after_what_was_read_before(failure):
    source = Recorder(fail_at=2, failure=failure)
    with Prefetcher(source, start=0, rows=range(8), device=CPU, depth=4) as prefetcher:
        next(prefetcher)
        next(prefetcher)
        for _ in range(2):  # not only once: a second call must not wait for ever
            with pytest.raises(type(failure)) as caught:
                next(prefetcher)
            assert caught.value is failure


def test_closing_ends_the_thread_whatever_it_does():
    source = Recorder()
    prefetcher = Prefetcher(source, start=0, rows=range(8), device=CPU, depth=1)
    wait_until(lambda: source.read == [0])  # now it waits to be asked for more
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
    prefetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(prefetcher)

    with Prefetcher(batches(), start=0, rows=range(8), device=CPU) as busy:
        pass
    assert not busy._thread.is_alive()


def test_an_exception_in_the_loop_ends_it_too():
    def loop():
        with Prefetcher(batches(), start=0, rows=range(8), device=CPU) as prefetcher:
            next(prefetcher)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_one_that_is_dropped_ends():
    prefetcher = Prefetcher(batches(), start=0, rows=range(8), device=CPU)
    next(prefetcher)
    thread = prefetcher._thread
    del prefetcher
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"depth": 0}, "depth is 0"), ({"start": -1}, "data step is -1"), ({"rows": range(9)}, "row 8 ")],
)
def test_impossible_settings_are_refused_before_a_thread_starts(settings, words):
    with pytest.raises(ValueError, match=words):
        Prefetcher(batches(), **{"start": 0, "rows": range(8), "device": CPU, **settings})


def test_batches_go_to_the_device():
    with Prefetcher(batches(), start=0, rows=range(8), device=torch.device("meta")) as prefetcher:
        inputs, targets = next(prefetcher)
    assert inputs.device.type == targets.device.type == "meta"
    assert inputs.shape == (8, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_arrive_whole_on_cuda():
    """Pinned blocks are reused; none may be while its copy is under way."""
    source = Batches(Lines(4_000_001), context=1024, rows=64, seed=0)
    with Prefetcher(source, start=0, rows=range(64), device=torch.device("cuda")) as prefetcher:
        arrived = []
        for _ in range(40):
            torch.cuda._sleep(20_000_000)
            arrived.append(next(prefetcher))
        for t, (inputs, targets) in enumerate(arrived):
            assert torch.equal(inputs.cpu(), source.step(t)[0])
            assert torch.equal(targets.cpu(), source.step(t)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_told_and_does_not_hang():
    with Prefetcher(batches(), start=0, rows=range(8), device=CPU) as prefetcher:
        # Held across the fork, as the thread might hold it: a child that touches it hangs.
        with prefetcher._channel.wanted._cond:
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                try:
                    next(prefetcher)
                except RuntimeError as refused:
                    prefetcher.close()
                    os._exit(0 if "fork" in str(refused) else 1)
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        next(prefetcher)  # the parent's goes on


@pytest.mark.parametrize("delay", [30.0, 0.0])
def test_ctrl_c_ends_the_loop(delay):
    """One that waits for a slow disk, and one at full speed."""
    source, go_on = batches(), threading.Event()

    class Slow(Lines):
        def __init__(self):
            super().__init__()
            self.train.windows = lambda starts, length: go_on.wait(delay) or starts[:, None] + np.arange(length)

    source.dataset = Slow()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    def loop():
        with Prefetcher(source, start=0, rows=range(8), device=CPU) as prefetcher:
            try:
                for _ in prefetcher:
                    pass
            except KeyboardInterrupt:
                go_on.set()  # closing waits for the disk
                raise

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_a_program_that_forgets_to_close_ends():
    code = """
import numpy as np, torch
from sophia.data.loader import Batches, Prefetcher
from tests.data.test_loader import Lines

batches = Batches(Lines(), context=10, rows=8, seed=0)
prefetcher = Prefetcher(batches, start=0, rows=range(8), device=torch.device("cpu"))
next(prefetcher)
raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.endswith("\nKeyboardInterrupt\n")
