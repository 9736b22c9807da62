"""`gamma="auto"` on several ranks: every coordinate counts once, whoever holds it, and all ranks have one γ."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sophia import Sophia

SHAPES = ((7, 30), (40, 5), (3,))  # seven rows: shards of unequal size


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gamma_after_two_refreshes(placements):
    """With one parameter in shards, one replicated as a DTensor, one plain; or all plain in a single process."""

    def placed(tensors):
        if placements is None:
            return tensors
        world = dist.get_world_size()
        mesh = init_device_mesh("cpu", (world // 2, 2)) if len(placements) == 2 else init_device_mesh("cpu", (world,))
        replicated = [Replicate()] * len(placements)
        sharded, whole, plain = tensors
        return [distribute_tensor(sharded, mesh, placements), distribute_tensor(whole, mesh, replicated), plain]

    params = [nn.Parameter(p) for p in placed(drawn(0))]
    optimizer = Sophia(params, gamma="auto", clip_target=0.4, betas=(0.5, 0.5), lr=1e-3)
    # So different that a parameter that counts too much or too little moves γ.
    factors = (1.0, 100.0, 1.0)
    for t in range(2):
        curvature = [f * e.square() for f, e in zip(factors, drawn(10 + t), strict=True)]
        assert optimizer.update_curvature(placed(curvature))
        for p, grad in zip(params, placed(drawn(20 + t)), strict=True):
            p.grad = grad
        optimizer.step()
    assert optimizer.update_curvature([None] * 3)
    return optimizer.param_groups[0]["gamma"]


@pytest.mark.parametrize(
    ("placements", "world"),
    [([Shard(0)], 2), ([Shard(0)], 4), ([Replicate(), Shard(0)], 4), ([Replicate(), Shard(1)], 4)],
)
def test_gamma_is_that_of_a_single_process_bit_for_bit(ranks, placements, world):
    alone = gamma_after_two_refreshes(None)
    assert alone != 0.05
    assert ranks.run(gamma_after_two_refreshes, placements, world=world) == [alone] * world
