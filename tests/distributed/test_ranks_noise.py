"""Trap 1: without `rows` each rank draws noise of its own, and the curvature is the single process's in expectation."""

import pytest
import torch
from torch import nn

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett
from tests import exact
from tests.distributed import engines

CONTEXTS, CLASSES, SAMPLES = 600, 6, 24


class Table(nn.Module):
    """logits = table[token]: so many independent parameters that few refreshes show a wrong factor."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(CONTEXTS, CLASSES, generator=generator))

    def forward(self, tokens):
        return self.table[tokens]


def tokens_of(rank, world, *, shared):
    """16 rows of tokens for all ranks together, or, shared, the same 16 rows for each of them (a bad sampler)."""
    tokens = torch.randint(0, CONTEXTS, (16, 128), generator=torch.Generator().manual_seed(1))
    return tokens if shared else tokens[rank::world]


def exact_diagonal(tokens):
    """Of the mean loss: p (1 − p) of each entry, by how often its context occurs."""
    probs = Table().table.detach().softmax(-1)
    share = torch.bincount(tokens.flatten(), minlength=CONTEXTS).unsqueeze(-1) / tokens.numel()
    return exact.flat([share * probs * (1 - probs)])


def draw(engine, shared, noise):
    """Independent estimates, [SAMPLES, parameters]."""
    tokens = tokens_of(*engines.place(), shared=shared)
    model = engines.spread(engine, Table())
    # β2 = 0: the state is the estimate. lr = 0: all estimates are of the same model.
    optimizer = SophiaG(
        model.parameters(), 0.0, (0.9, 0.0), curvature_interval=1, estimator=GaussNewtonBartlett(noise=noise)
    )
    drawn = []
    for _ in range(SAMPLES):
        assert optimizer.refresh_curvature(lambda: model(tokens))
        drawn.append(exact.flat([engines.snapshot(model, optimizer)["table.hessian"]]))
        optimizer.step()
    return torch.stack(drawn)


@pytest.mark.parametrize(
    ("engine", "world", "shared", "noise"),
    [
        ("ddp", 2, True, "labels"),
        ("ddp", 4, True, "signs"),
        ("ddp", 4, False, "labels"),
        ("fsdp", 2, True, "signs"),
        ("fsdp", 4, False, "labels"),
    ],
)
def test_unbiased_whatever_data_the_ranks_hold(ranks, engine, world, shared, noise):
    truth = exact_diagonal(tokens_of(0, 1, shared=shared))
    drawn = ranks.run(draw, engine, shared, noise, world=world)[0]
    exact.assert_unbiased(drawn, truth, Table())
    for factor in (1.1, 1 / 1.1):
        with pytest.raises(AssertionError):
            exact.assert_unbiased(drawn * factor, truth, Table())


def sum_of_two(rows):
    """The estimate of two ranks with equal data, whose noise `rows` makes equal if it names the same rows on both."""
    rank, _ = engines.place()
    tokens = tokens_of(0, 1, shared=True)
    model = engines.spread("ddp", Table())
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
    optimizer.refresh_curvature(lambda: model(tokens), rows=None if rows is None else rows[rank])
    return engines.snapshot(model, optimizer)["table.hessian"]


def test_noise_belongs_to_the_global_row_and_else_to_the_rank(ranks):
    first, second = list(range(16)), list(range(16, 32))
    model = Table()
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
    optimizer.refresh_curvature(lambda: model(tokens_of(0, 1, shared=True)), rows=first)
    alone = engines.snapshot(model, optimizer)["table.hessian"]
    # The same rows twice: the same noise twice, (2 s)² / 2 N. Other rows, or none given: other noise.
    torch.testing.assert_close(ranks.run(sum_of_two, [first, first])[0], 2 * alone)
    for rows in ([first, second], None):
        ratio = ranks.run(sum_of_two, rows)[0].sum() / alone.sum()
        assert 0.8 < ratio < 1.25
