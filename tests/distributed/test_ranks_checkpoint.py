"""Checkpoints by torch.distributed.checkpoint: reloaded on any number of ranks, the run goes on as if never stopped."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from sophia import SophiaG
from tests.distributed import engines

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
# Counts of estimates are state as well, and γ is a setting that changes.
FIXED = {"gamma": 0.2}
AUTO = {"gamma": "auto", "clip_target": 0.6, "bias_correction": True}
STOP, END = 4, 8  # refreshes are due at 0, 3 and 6: the checkpoint lies between two


def build(engine, dtype, **settings):
    options = {"find_unused_parameters": True} if engine == "ddp" else {}
    model = engines.wrap(engine, engines.build(dtype, spare=True, **settings), **options)
    return model, model.parameters()


def advance(model, optimizer, first, last):
    """Steps whose gradients reach all parameters; the refresh leaves the spare one out, so that it holds still."""
    own = engines.own_rows()
    for step in range(first, last):
        tokens, targets = engines.batch(step)
        optimizer.refresh_curvature(lambda tokens=tokens: model(tokens[own], False), rows=own)
        F.cross_entropy(model(tokens[own]).flatten(0, 1).float(), targets[own].flatten()).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*so they hold still")
            optimizer.step()
        optimizer.zero_grad()


def settings_of(optimizer):
    """All of a param group but its parameters: the settings and the clock."""
    kept = [{k: v for k, v in group.items() if not k.startswith("param")} for group in optimizer.param_groups]
    return [{**group, "betas": tuple(group["betas"])} for group in kept]  # torch's broadcast makes lists of tuples


def save(engine, folder, dtype, flatten, chosen=FIXED):
    model, params = build(engine, dtype)
    optimizer = SophiaG(params, lr=1e-2, curvature_interval=3, seed=5, **chosen)
    advance(model, optimizer, 0, STOP)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=folder)
    return engines.snapshot(model, optimizer), settings_of(optimizer)


def resume(engine, folder, dtype, flatten, chosen=FIXED):
    """On other initial weights and settings: what was loaded, and the end of the run."""
    model, params = build(engine, dtype, seed=1)
    # A distributed checkpoint gives what is asked for: the count is, where estimates are counted.
    counted = {"bias_correction": True} if "bias_correction" in chosen else {}
    optimizer = SophiaG(params, lr=3e-4, curvature_interval=10, seed=6, **counted)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    check_kinds(model, optimizer)
    loaded = engines.snapshot(model, optimizer), settings_of(optimizer)
    advance(model, optimizer, STOP, END)
    return loaded, (engines.snapshot(model, optimizer), settings_of(optimizer))


def check_kinds(model, optimizer):
    """State lies as its parameter does, in at least fp32."""
    for p in engines.parameters(model).values():
        for key in ("exp_avg", "hessian"):
            state = optimizer.state[p][key]
            assert isinstance(state, DTensor) == isinstance(p, DTensor)
            assert not isinstance(p, DTensor) or state.placements == p.placements
            assert state.dtype == torch.promote_types(p.dtype, torch.float32)


def uninterrupted(engine, dtype, chosen=FIXED):
    model, params = build(engine, dtype)
    optimizer = SophiaG(params, lr=1e-2, curvature_interval=3, seed=5, **chosen)
    advance(model, optimizer, 0, END)
    return engines.snapshot(model, optimizer), settings_of(optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # loading in a single process is what is meant
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("saver", "savers", "loader", "loaders"),
    [("fsdp", 2, "fsdp", 4), ("fsdp", 2, "none", 1), ("ddp", 2, "fsdp", 4), ("hsdp", 4, "ddp", 2)],
)
def test_reloads_on_another_number_of_ranks(ranks, tmp_path, saver, savers, loader, loaders, flatten):
    settings = (str(tmp_path), torch.float64, flatten)
    saved, saved_groups = ranks.run(save, saver, *settings, world=savers)[0]
    expected, expected_groups = uninterrupted("none", torch.float64)
    alone = loaders == 1
    found = [resume(loader, *settings)] if alone else ranks.run(resume, loader, *settings, world=loaders)
    for (loaded, loaded_groups), (final, final_groups) in found:
        engines.assert_same(loaded, saved)
        assert loaded_groups == saved_groups
        engines.assert_same(final, expected, **CLOSE)
        assert final_groups == expected_groups


@pytest.mark.parametrize(("saver", "savers", "loader", "loaders"), [("fsdp", 2, "ddp", 4), ("ddp", 2, "fsdp", 2)])
def test_counts_of_estimates_and_gamma_go_along(ranks, tmp_path, saver, savers, loader, loaders):
    """The spare parameter, which no estimate has reached, has counted none."""
    settings = (str(tmp_path), torch.float64, False, AUTO)
    saved, saved_groups = ranks.run(save, saver, *settings, world=savers)[0]
    assert {name: value.item() for name, value in saved.items() if name.endswith(".refreshes")} == {
        f"{name}.refreshes": 0 if name == "spare" else 2 for name in engines.parameters(build("none", torch.float64)[0])
    }
    assert saved_groups[0]["gamma"] != 0.05
    expected, expected_groups = uninterrupted("none", torch.float64, AUTO)
    for (loaded, loaded_groups), (final, final_groups) in ranks.run(resume, loader, *settings, world=loaders):
        engines.assert_same(loaded, saved)
        assert loaded_groups == saved_groups
        engines.assert_same(final, expected, **CLOSE)
        assert [g.pop("gamma") for g in final_groups] == pytest.approx([g["gamma"] for g in expected_groups], rel=1e-9)
        assert final_groups == [{k: v for k, v in g.items() if k != "gamma"} for g in expected_groups]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_never_reached_curvature_stays_so(ranks, tmp_path, engine):
    settings = (engine, str(tmp_path), torch.float64, False)
    ranks.run(save, *settings)
    for (loaded, _), (final, _) in ranks.run(resume, *settings):
        assert torch.equal(final["spare"], engines.build(torch.float64, spare=True).spare)  # it has held still,
        assert not torch.equal(final["spare.exp_avg"], loaded["spare.exp_avg"])  # though its momentum lives,
        for snapshot in (loaded, final):  # because of a curvature of negative zeros
            assert (snapshot["spare.hessian"] == 0).all()
            assert torch.signbit(snapshot["spare.hessian"]).all()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_bf16_parameters_keep_fp32_state(ranks, tmp_path, engine, flatten):
    settings = (engine, str(tmp_path), torch.bfloat16, flatten)
    saved = ranks.run(save, *settings)
    whole_run = ranks.run(uninterrupted, engine, torch.bfloat16)
    for rank, (loaded, final) in enumerate(ranks.run(resume, *settings)):
        for found, expected in ((loaded, saved[rank]), (final, whole_run[rank])):
            engines.assert_same(found[0], expected[0])
            assert found[1] == expected[1]
        moments = [value for name, value in loaded[0].items() if name.endswith(("exp_avg", "hessian"))]
        assert any(not torch.equal(value, value.bfloat16().float()) for value in moments)  # bf16 could not hold it


def pass_on(engine):
    """From one optimizer to another by a full state dict that rank 0 holds, without a file."""
    model, params = build(engine, torch.float32)
    optimizer = SophiaG(params, lr=1e-2, curvature_interval=3, seed=5)
    advance(model, optimizer, 0, STOP)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    heir = SophiaG(model.parameters())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, heir, state if engines.place()[0] == 0 else {}, options=options)
    check_kinds(model, heir)
    found, expected = engines.snapshot(model, heir), engines.snapshot(model, optimizer)
    return found, expected, settings_of(heir), settings_of(optimizer)


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_full_state_dict_from_rank_0(ranks, engine, world):
    for found, expected, groups, expected_groups in ranks.run(pass_on, engine, world=world):
        engines.assert_same(found, expected)
        assert groups == expected_groups
