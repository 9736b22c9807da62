"""The harness itself: what a rank returns, raises, warns of or waits for reaches the test."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankFailed, Ranks


def place_and_sum(offset):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise LookupError("rank one has lost its way")
    dist.barrier()


def die_on_rank_one(log, times):
    """So many times, in whatever processes."""
    if dist.get_rank() == 1:
        died = len(log.read_text()) if log.exists() else 0
        log.write_text("x" * (died + 1))
        if died < times:
            os._exit(134)
    return dist.get_world_size()


def warn():
    warnings.warn("a careless word", stacklevel=1)


def sleep_on_rank_one():
    if dist.get_rank() == 1:
        time.sleep(60)


@pytest.mark.parametrize("world", [4, 2])
def test_results_come_in_the_order_of_ranks(ranks, world):
    total = sum(range(world)) + 10 * world
    assert ranks.run(place_and_sum, 10, world=world) == [(rank, world, total) for rank in range(world)]


def test_ranks_that_do_not_meet_try_again_as_new_processes(tmp_path):
    """Once gloo has failed on one rank, that rank's next groups have other names than everybody's."""
    own = Ranks(tmp_path)
    try:
        (tmp_path / "store-1").mkdir()  # where their first rendezvous would be
        assert own.run(place_and_sum, 10) == [(0, 2, 21), (1, 2, 21)]
        for number in range(3, 6):
            (tmp_path / f"store-{number}").mkdir()
        with pytest.raises(RankFailed, match="init_process_group"):
            own.run(place_and_sum, 10)
        assert own.run(place_and_sum, 20) == [(0, 2, 41), (1, 2, 41)]
    finally:
        own.close()


def test_a_rank_that_dies_is_tried_again_and_told_if_it_dies_each_time(tmp_path):
    own = Ranks(tmp_path)
    try:
        assert own.run(die_on_rank_one, tmp_path / "died", 1) == [2, 2]
        with pytest.raises(RankFailed, match="rank 1:\nthe process died"):
            own.run(die_on_rank_one, tmp_path / "dies", 9)
    finally:
        own.close()


def test_a_failure_on_one_rank_frees_those_that_wait(ranks):
    start = time.monotonic()
    with pytest.raises(RankFailed, match="lost its way"):
        ranks.run(fail_on_rank_one)
    assert time.monotonic() - start < 20


def test_warnings_are_errors(ranks):
    with pytest.raises(RankFailed, match="careless word"):
        ranks.run(warn)


def test_a_rank_that_hangs_is_stopped_and_replaced(ranks):
    with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
        ranks.run(sleep_on_rank_one, seconds=1)
    assert len(ranks.run(place_and_sum, 0)) == 2
