"""What ranks agree upon at every step: the loss that guards look at, whether to update, and whether to stop."""

import math

import pytest
import torch
import torch.distributed as dist

from sophia import checkpoint, distributed, optimizers
from sophia.optim import kernels
from sophia.step import Stepper
from tests.distributed import training


def exchanged(numbers, flags, between_hosts):
    rank = dist.get_rank()
    here = distributed._world_of(torch.device("cuda" if between_hosts else "cpu"), node_size=0)
    assert (here.hosts is not None) is between_hosts
    total, flag = here.exchange(torch.tensor(numbers[rank], dtype=torch.float64), flags[rank])
    return total.shape, total.item(), flag


@pytest.mark.parametrize("between_hosts", [False, True], ids=["in one message", "hosts apart"])
def test_the_loss_is_added_and_one_flag_is_enough(ranks, between_hosts):
    assert ranks.run(exchanged, (0.1, 0.2), (False, False), between_hosts) == [((), 0.1 + 0.2, False)] * 2
    assert ranks.run(exchanged, (0.5, 0.25), (False, True), between_hosts) == [((), 0.75, True)] * 2
    for _, total, flag in ranks.run(exchanged, (1.0, math.nan), (True, False), between_hosts):
        assert math.isnan(total)
        assert flag


def disturbed(settings, damage, far):
    """Train, with damage to rank 1 at two of the batches; `far` takes its memory to be as far away as a GPU's."""
    original = Stepper.gradients

    def gradients(self, inputs, targets, *, index):
        loss = original(self, inputs, targets, index=index)
        if index in (2, 5) and dist.get_rank() == 1:
            if damage == "loss":
                return loss + math.inf
            next(p for p in self.model.parameters() if p.grad is not None).grad.mul_(math.nan)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "gradients", gradients)
        if far:
            patch.setattr(optimizers, "_READ_AT_ONCE", frozenset())
            patch.setattr(kernels, "readable", lambda tensor: False)
        training.run(settings)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sophia-g"])
@pytest.mark.parametrize(("parallel", "damage"), [("ddp", "loss"), ("fsdp", "loss"), ("fsdp", "gradient")])
def test_what_is_not_finite_on_one_rank_leaves_out_the_update_on_all(ranks, tmp_path, optimizer, parallel, damage):
    data = training.write_data(tmp_path / "data")
    for name, far in (("near", False), ("far", True)):
        settings = training.settings(data, tmp_path / name, optimizer, parallel=parallel)
        ranks.run(disturbed, settings, damage, far)
        lines = training.metrics(tmp_path / name)
        assert [line["step"] for line in lines if line.get("event") == "skipped"] == [3, 6]
        assert all(bool(value.isfinite().all()) for value in training.tensors(tmp_path / name).values())
    for kind in ("model", "optimizer"):
        near, far = (training.tensors(tmp_path / name, kind) for name in ("near", "far"))
        assert near.keys() == far.keys()
        for name, value in near.items():
            torch.testing.assert_close(far[name], value, rtol=1e-10, atol=1e-11)
    steps = checkpoint.steps(tmp_path / "near" / "checkpoints")
    assert steps == [4, training.STEPS]
