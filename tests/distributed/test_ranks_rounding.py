"""bfloat16 state over several ranks: replicas round alike, shards each with noise of their own."""

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG
from sophia.optim.dtensor import local
from tests.distributed import engines


def train(engine):
    """Three steps; this rank's part of every m and h, and the parameters."""
    model = engines.wrap(engine, engines.build(torch.float32))
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=2, state_dtype=torch.bfloat16)
    own = engines.own_rows()
    for step in range(3):
        tokens, targets = engines.batch(step)
        optimizer.refresh_curvature(lambda tokens=tokens: model(tokens[own]), rows=own)
        F.cross_entropy(model(tokens[own]).flatten(0, 1), targets[own].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [local(optimizer.state[p][name]).clone() for p in model.parameters() for name in ("exp_avg", "hessian")]
    return states, [local(p).detach().clone() for p in model.parameters()], list(optimizer._keys.values())


@pytest.mark.parametrize("engine", ["ddp", "hsdp"])
def test_replicas_agree_and_shards_have_noise_of_their_own(ranks, engine):
    world = 2 if engine == "ddp" else 4
    found = ranks.run(train, engine, world=world)
    groups = [found] if engine == "ddp" else [found[0::2], found[1::2]]
    for replicas in groups:
        for states, params, keys in replicas[1:]:
            assert all(torch.equal(a, b) for a, b in zip(states, replicas[0][0], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(params, replicas[0][1], strict=True))
            assert keys == replicas[0][2]
    if engine == "hsdp":
        assert not set(groups[0][0][2]) & set(groups[1][0][2])
