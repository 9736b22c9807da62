"""Trap 12: what counts is counted over all ranks and chunks together, however unevenly it lies on them."""

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett
from tests.distributed import engines

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def global_mask(kind):
    """[ROWS, CONTEXT]. Of two ranks the first holds the even rows, the second the odd ones."""
    mask = torch.zeros(engines.ROWS, engines.CONTEXT, dtype=torch.bool)
    if kind == "one and seven":
        mask[2, 1] = True
        mask[1::2, :2] = True
        mask[7, 1] = False
    elif kind == "nothing on the second rank":
        mask[::4] = True
    elif kind == "one prediction in all":
        mask[5, 3] = True
    elif kind == "empty chunks":  # of four chunks of rows modulo four, the second and the last have nothing to count
        mask[0, 2] = True
        mask[2::4, 1:] = True
    return mask


def estimate_and_train(engine, kind, chunks, noise):
    model = engines.wrap(engine, engines.build())
    estimator = GaussNewtonBartlett(chunks=chunks, noise=noise)
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), estimator=estimator)
    tokens, targets = engines.batch()
    own, mask = engines.own_rows(), global_mask(kind)
    assert optimizer.refresh_curvature(lambda: (model(tokens[own]), mask[own]), rows=own)
    # The engine must be ready for training: a rank that left out its backward pass would stop here.
    F.cross_entropy(model(tokens[own]).flatten(0, 1), targets[own].flatten()).backward()
    return engines.snapshot(model, optimizer)


@pytest.mark.parametrize(
    "kind", ["one and seven", "nothing on the second rank", "one prediction in all", "empty chunks"]
)
@pytest.mark.parametrize(
    ("engine", "world", "chunks", "noise"),
    [("ddp", 2, 1, "labels"), ("ddp", 2, 4, "signs"), ("fsdp", 2, 1, "labels"), ("fsdp", 4, 4, "signs")],
)
def test_unequal_counts(ranks, engine, world, kind, chunks, noise):
    alone = estimate_and_train("none", kind, chunks, noise)
    for snapshot in ranks.run(estimate_and_train, engine, kind, chunks, noise, world=world):
        engines.assert_same(snapshot, alone, **CLOSE)


def test_the_masks_are_as_uneven_as_they_say():
    assert [int(global_mask("one and seven")[rank::2].sum()) for rank in (0, 1)] == [1, 7]
    assert [int(global_mask("nothing on the second rank")[rank::2].sum()) for rank in (0, 1)] == [8, 0]
    assert [int(global_mask("empty chunks")[chunk::4].sum()) for chunk in range(4)] == [1, 0, 6, 0]


def estimate_of_forwards(engine, owners, counts):
    """A forward a micro-batch, of which rank r holds the rows that owners gives it; counts masks columns."""
    rank, world = engines.place()
    model = engines.wrap(engine, engines.build())
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
    forwards, rows = [], []
    for number, (ranks_of_rows, columns) in enumerate(zip(owners, counts, strict=True)):
        tokens, _ = engines.batch(number, rows=len(ranks_of_rows))
        own = [row for row, owner in enumerate(ranks_of_rows) if world == 1 or owner == rank]
        mask = torch.arange(engines.CONTEXT).expand(len(own), -1) < columns
        forwards.append(lambda tokens=tokens[own], mask=mask: (model(tokens), mask))
        rows += [100 * number + row for row in own]
    assert optimizer.refresh_curvature(forwards, rows=rows)
    return engines.snapshot(model, optimizer)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_ranks_with_different_numbers_of_rows(ranks, engine):
    # Three micro-batches: shared 1 to 3, all on the first rank (the second has a batch of no rows), shared 2 to 1.
    owners, counts = [[0, 1, 1, 1], [0, 0], [0, 1, 0]], [4, 1, 2]
    alone = estimate_of_forwards("none", owners, counts)
    for snapshot in ranks.run(estimate_of_forwards, engine, owners, counts):
        engines.assert_same(snapshot, alone, **CLOSE)


def estimate_by_hand(owners, counts):
    """The definition, h̃ = (1/N) Σ_c s_c², from the gradients of single forwards: s_c² = N_c h̃_c."""
    total, parts = 0, None
    for number in range(len(owners)):
        model = engines.build()
        optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
        tokens, _ = engines.batch(number, rows=len(owners[number]))
        mask = torch.arange(engines.CONTEXT).expand(len(tokens), -1) < counts[number]
        optimizer.refresh_curvature(
            lambda model=model, tokens=tokens, mask=mask: (model(tokens), mask),
            rows=[100 * number + row for row in range(len(tokens))],
        )
        squares = {k: v * int(mask.sum()) for k, v in engines.snapshot(model, optimizer).items() if "hessian" in k}
        parts = squares if parts is None else {k: v + squares[k] for k, v in parts.items()}
        total += int(mask.sum())
    return {k: v / total for k, v in parts.items()}


def test_chunks_weigh_as_much_as_they_count():
    owners, counts = [[0, 1, 1, 1], [0, 0], [0, 1, 0]], [4, 1, 2]
    found = estimate_of_forwards("none", owners, counts)
    expected = estimate_by_hand(owners, counts)
    engines.assert_same({k: v for k, v in found.items() if "hessian" in k}, expected, **CLOSE)
