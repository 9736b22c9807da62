"""State: saved, loaded, copied and pickled in the middle of training."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG
from tests.regression import parameters_equal, regression, train


@pytest.mark.parametrize("weights_only", [True, False])
def test_state_dict_round_trip_in_the_middle_of_training(weights_only):
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=4)
    train(model, optimizer, inputs, labels, 6)  # a refresh is not due
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, inputs, labels, 7)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=weights_only)
    again, _, _ = regression(seed=5)
    again.load_state_dict(saved["model"])
    resumed = SophiaG(again.parameters())
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, inputs, labels, 7)
    assert parameters_equal(model, again)


def test_loading_copies_state():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2)
    train(model, optimizer, inputs, labels, 2)
    twin = copy.deepcopy(model)
    other = SophiaG(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    train(twin, other, inputs, labels, 3)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, saved["state"][index][name]) for name, value in state.items())


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_trap_9_state_dtype_survives_loading_onto_another_parameter_dtype(dtype, state_dtype):
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), state_dtype=state_dtype)
    train(model, optimizer, inputs, labels, 3)
    low = copy.deepcopy(model).to(dtype)
    other = SophiaG(low.parameters(), state_dtype=state_dtype)
    other.load_state_dict(optimizer.state_dict())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in zip(model.parameters(), low.parameters(), strict=True):
        for name in ("exp_avg", "hessian"):
            assert other.state[q][name].dtype == (state_dtype or wide)
            assert torch.equal(other.state[q][name].double(), optimizer.state[p][name].double())
    train(low, other, inputs.to(dtype), labels, 12)


def test_a_smaller_state_dtype_is_applied_on_load():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters())
    train(model, optimizer, inputs, labels, 3)
    other = SophiaG(model.parameters(), state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert all(state["hessian"].dtype == torch.bfloat16 for state in other.state.values())


def test_old_state_dicts_take_defaults():
    """Settings and time fields that a state dict lacks come from the optimizer; steps from the state."""
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2)
    train(model, optimizer, inputs, labels, 13)
    old = copy.deepcopy(optimizer.state_dict())
    old["param_groups"] = [{"params": group["params"], "lr": 0.3} for group in old["param_groups"]]
    other = SophiaG(model.parameters(), lr=1e-2, gamma=0.7, curvature_interval=5)
    other.load_state_dict(old)
    group = other.param_groups[0]
    assert (group["lr"], group["gamma"], group["curvature_interval"], group["clock"]) == (0.3, 0.7, 5, 13)
    assert other.curvature_due
    train(model, other, inputs, labels, 3)


def test_partial_state_starts_anew():
    """AdamW's state dict: momentum is kept, curvature is missing, so parameters hold until a refresh."""
    model, inputs, labels = regression()
    adam = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(inputs), labels).backward()
    adam.step()
    optimizer = SophiaG(model.parameters())
    optimizer.load_state_dict(adam.state_dict())
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], adam.state[p]["exp_avg"])
        assert not optimizer.state[p]["hessian"].any()
    with pytest.raises(RuntimeError, match="refresh_curvature"):
        optimizer.step()
    train(model, optimizer, inputs, labels, 2)


def test_state_for_some_parameters_only():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters())
    train(model, optimizer, inputs, labels, 2)
    partial = copy.deepcopy(optimizer.state_dict())
    del partial["state"][1]
    other = SophiaG(model.parameters())
    other.load_state_dict(partial)
    assert len(other.state) == 3
    train(model, other, inputs, labels, 12)
    assert len(other.state) == 4


def test_loading_a_wrong_number_of_parameters_is_refused():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters())
    train(model, optimizer, inputs, labels, 1)
    other = SophiaG(model[0].parameters())
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_deepcopy_continues_like_the_original():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2, seed=3)
    train(model, optimizer, inputs, labels, 4)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert twin_optimizer.param_groups[0]["params"][0] is next(twin.parameters())
    train(model, optimizer, inputs, labels, 8)
    train(twin, twin_optimizer, inputs, labels, 8)
    assert parameters_equal(model, twin)


def test_pickle_continues_like_the_original():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2, state_dtype=torch.bfloat16)
    train(model, optimizer, inputs, labels, 4)
    twin, twin_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, inputs, labels, 8)
    train(twin, twin_optimizer, inputs, labels, 8)
    assert parameters_equal(model, twin)
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in twin_optimizer.state.values())


def test_load_hooks_may_change_the_state_dict():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters())
    train(model, optimizer, inputs, labels, 2)

    def forget_momentum(_, state_dict):
        state = {k: {**v, "exp_avg": torch.zeros_like(v["exp_avg"])} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other = SophiaG(model.parameters())
    other.register_load_state_dict_pre_hook(forget_momentum)
    other.load_state_dict(optimizer.state_dict())
    assert not any(state["exp_avg"].any() for state in other.state.values())
    assert all(state["hessian"].any() for state in other.state.values())
