"""The trainer on any number of ranks, under any engine, is the same run: every number of it, at every step."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

from sophia import distributed, micro_batch
from sophia.model import GPT, FeedForward, GPTConfig
from tests.distributed import engines, training

CLOSE = {"rtol": 1e-10, "atol": 1e-11}  # float64: only the order of sums may differ
ENGINES = {
    "ddp 2": ("ddp", 2),
    "ddp 4": ("ddp", 4),
    "fsdp 2": ("fsdp", 2),
    "fsdp 4": ("fsdp", 4),
    "hsdp 4": ("hsdp", 4),
}
RUNS = {
    # Fewer rows than four ranks, in two chunks: on four ranks one has none, and each chunk misses some.
    "labels": {"optimizer": "sophia-g", "curvature_rows": 3, "curvature_chunks": 2},
    "signs": {"optimizer": "sophia-g", "curvature_rows": 7, "curvature_chunks": 4, "curvature_noise": "signs"},
    # Two, two and one on one rank; two and one, two and none on two; two, one, one and one on four.
    "hutchinson": {"optimizer": "sophia-h", "curvature_rows": 5},
    # Everything that a study of Sophia changes.
    "auto": {
        "optimizer": "sophia-g",
        **{"curvature_rows": 3, "curvature_chunks": 2, "curvature_interval": 2, "refresh_when": "after"},
        **{"gamma": "auto", "clip_target": 0.6, "bias_correction": True, "eps": 1e-9},
    },
    # Behind LayerNorm a matrix has directions without any gradient: a small eps would make an update of rounding there.
    "matrices": {
        **{"optimizer": "sophia-k", "gamma": 0.2, "exponent": 1.0},
        **{"curvature_rows": 7, "curvature_chunks": 4, "eps": 1e-5},
    },
    "curvature for all": {
        "optimizer": "sophia-k",
        **{"curvature_rows": 3, "curvature_chunks": 2, "others": "curvature", "refresh_when": "after", "eps": 1e-5},
    },
    "adamw": {"optimizer": "adamw"},
    "nadamw": {"optimizer": "nadamw"},
    "lion": {"optimizer": "lion"},
    "signum": {"optimizer": "signum"},
    "muon": {"optimizer": "muon"},
}
CASES = [
    *((run, engine) for run in ("labels", "hutchinson") for engine in ENGINES),
    *(("signs", engine) for engine in ("ddp 4", "fsdp 2")),
    *(("auto", engine) for engine in ("ddp 2", "fsdp 4", "hsdp 4")),
    *(("adamw", engine) for engine in ("ddp 4", "fsdp 2", "hsdp 4")),
    *(("lion", engine) for engine in ("ddp 2", "fsdp 4")),
    *(("matrices", engine) for engine in ("ddp 2", "ddp 4", "fsdp 2", "hsdp 4")),
    *(("curvature for all", engine) for engine in ("ddp 4", "fsdp 4")),
    ("nadamw", "fsdp 2"),
    ("signum", "fsdp 4"),
    ("muon", "ddp 2"),
    ("muon", "ddp 4"),
]


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_any_number_of_ranks_gives_the_same_run(trained, run, engine):
    parallel, world = ENGINES[engine]
    alone, found = trained(**RUNS[run]), trained(parallel, world, **RUNS[run])
    training.assert_close(found, alone, **CLOSE)


def test_what_is_compared_is_worth_it(trained):
    """Gradients are clipped in some steps and not in others, coordinates in part, and curvature matters."""
    for run in ("labels", "signs", "hutchinson", "matrices"):
        lines = [line for line in training.metrics(trained(**RUNS[run])) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, training.STEPS + 1))
        assert all(0.1 < line["clip_fraction"] < 0.95 for line in lines), run
        norms = [line["grad_norm"] for line in lines]
        assert min(norms) < training.MAX_GRAD_NORM < max(norms), norms
    steps = [line["step"] for line in training.metrics(trained(**RUNS["adamw"])) if "val_loss" in line]
    assert steps == [0, 3, 6, 7]


def test_in_single_precision(trained):
    alone, found = trained(double=False, **RUNS["labels"]), trained("ddp", 2, double=False, **RUNS["labels"])
    training.assert_close(found, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", ["labels", "hutchinson"])
def test_curvature_in_bfloat16(trained, run):
    """FSDP2 gathers parameters in bfloat16 then: of that the differences that Sophia-H takes would be rounding."""
    found = [trained(*engine, double=False, precision="bf16", **RUNS[run]) for engine in (("ddp", 1), ("fsdp", 2))]
    ours, theirs = (training.tensors(folder, "optimizer") for folder in found)
    for name, value in theirs.items():
        if name.endswith("hessian"):
            assert (ours[name] - value).norm() < 0.05 * value.norm(), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_one_micro_batch_or_several(trained, parallel):
    """Reduced gradients do not depend on how often they are accumulated before."""
    alone = trained(optimizer="adamw")
    training.assert_close(trained(parallel, 4, optimizer="adamw", micro_batch=1), alone, **CLOSE)


def short_of_memory(settings):
    """Train with the largest micro-batch that can be tried, where rank 1 has room for two sequences only."""
    original, tried = FeedForward.forward, micro_batch._tried

    def forward(self, x):
        if torch.distributed.get_rank() == 1 and len(x) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeedForward, "forward", forward)
        patch.setattr(micro_batch, "largest", lambda stepper, session: tried(stepper, session, [6, 3, 2, 1]))
        training.run(settings)


def test_ranks_take_the_micro_batch_that_fits_all(trained, ranks, tmp_path):
    settings = training.settings(
        training.write_data(tmp_path / "data"), tmp_path / "run", **RUNS["labels"], micro_batch="auto"
    )
    ranks.run(short_of_memory, settings)
    training.assert_close(tmp_path / "run", trained("ddp", 2, **RUNS["labels"]), rtol=0, atol=0)


def refused(settings, nodes=None):
    try:
        training.run(settings, nodes=nodes)
    except ValueError as problem:
        return str(problem)
    return None


@pytest.mark.parametrize(
    ("optimizer", "parallel"),
    [("muon", "fsdp"), ("muon", "hsdp"), ("soap", "fsdp"), ("torch.optim:SGD", "hsdp")],
)
def test_what_runs_under_ddp_only(ranks, tmp_path, optimizer, parallel):
    data = training.write_data(tmp_path / "data")
    settings = training.settings(data, tmp_path / "run", optimizer, parallel=parallel, lr=1e-3)
    for text in ranks.run(refused, settings, world=4):
        assert text.startswith(f"{optimizer} cannot run under {parallel}: ")
        assert text.endswith("choose --parallel ddp")
    assert not (tmp_path / "run").exists()


def test_soap_under_ddp(trained):
    """Near the run on one rank only: bases of singular statistics are completed by rounding."""
    alone, found = (training.metrics(trained("ddp", world, optimizer="soap")) for world in (1, 2))
    assert found[0]["val_loss"] == pytest.approx(alone[0]["val_loss"], rel=1e-10)
    assert found[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], rel=1e-2)


def muon_step(parallel):
    """A matrix after one step of torch's Muon, whole."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 24, bias=False)
    x = torch.randn(64, 8)
    if parallel == "fsdp":
        fully_shard(model)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    return engines.whole(model.weight)


def test_torch_gives_another_muon_on_shards(ranks):
    """Why it is refused. Were the difference gone, or of fp32, `session` could offer it."""
    alone = muon_step("none")
    assert torch.equal(ranks.run(muon_step, "none")[0], alone)
    difference = (ranks.run(muon_step, "fsdp")[0] - alone).abs().max().item()
    assert 1e-4 < difference < 1e-1


def test_hsdp_needs_several_nodes(ranks, tmp_path):
    settings = training.settings(training.write_data(tmp_path / "data"), tmp_path / "run", parallel="hsdp")
    (text,) = set(ranks.run(refused, settings, 1, world=2))
    assert text == (
        "hsdp shards within each node, and all 2 ranks are on one, as LOCAL_WORLD_SIZE tells: choose --parallel fsdp"
    )


def shard_partners():
    """The ranks that this rank shares a model with, on three nodes of two."""
    model = GPT(GPTConfig(vocab_size=5, context=2, layers=1, heads=1, width=6))
    with training.on_nodes(3), distributed.world("cpu") as here:
        distributed.spread(model, here, "hsdp", gathered=torch.float32)
    mesh = model.head.weight.device_mesh
    assert mesh.mesh_dim_names == ("replicate", "shard")
    assert model.head.weight.placements == (Replicate(), Shard(0))
    return torch.distributed.get_process_group_ranks(mesh.get_group("shard"))


def test_hsdp_shards_within_a_node(ranks):
    assert ranks.run(shard_partners, world=6) == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
