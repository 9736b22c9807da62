"""Checkpoints of the official code go on here as they would have there."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG
from sophia.convert import official_state_dict
from tests.test_convert import GRADIENTS, INTERVAL, RULE, STEPS, THETA, Official, official, official_estimates


def test_official_checkpoint_goes_on_as_if_never_moved():
    rho, predictions, bs, moved = 0.002, 300, 250, 14
    theirs, _ = official(rho=rho, bs=bs)
    _, before = official(rho=rho, bs=bs, last=moved)
    saved = before.state_dict()
    untouched = copy.deepcopy(saved)
    converted = official_state_dict(saved, predictions=predictions, bs=bs, curvature_interval=INTERVAL)
    torch.testing.assert_close(saved, untouched, rtol=0, atol=0)

    p = nn.Parameter(before.p.clone())
    optimizer = SophiaG([p], seed=7, capturable=False)  # all other settings come with the state
    optimizer.load_state_dict(converted)
    (group,) = optimizer.param_groups
    assert group["gamma"] == pytest.approx(rho * bs / predictions)
    assert "rho" not in group
    assert (group["lr"], group["initial_lr"], group["seed"], group["clock"]) == (3e-3, 3e-3, 7, moved)
    assert optimizer.refreshes == 3
    assert not optimizer.curvature_due
    estimates = official_estimates(predictions, start=moved)
    for t in range(moved, STEPS):
        assert optimizer.curvature_due == (t in estimates)
        if t in estimates:
            optimizer.update_curvature([estimates[t]])
        p.grad = GRADIENTS[t].clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), theirs[t], rtol=1e-11, atol=0)

    # Round trip: the state divided by the factor is the official one's.
    _, after = official(rho=rho, bs=bs)
    state = optimizer.state_dict()["state"][0]
    assert state["step"] == STEPS
    torch.testing.assert_close(state["exp_avg"], after.state["exp_avg"])
    torch.testing.assert_close(state["hessian"] / predictions, after.state["hessian"])


def test_a_loop_goes_on_from_an_official_checkpoint():
    """Two groups, bf16 parameters, a parameter that no estimate reached and one that never had a gradient."""
    model = nn.ModuleList([nn.Embedding(11, 6), nn.Linear(6, 11), nn.Linear(6, 6), nn.Linear(6, 6)]).bfloat16()
    params = list(model.parameters())
    state = {
        index: {
            "step": torch.tensor([31.0]),  # of a capturable one
            "exp_avg": torch.full_like(p, 1e-3),
            "hessian": torch.full_like(p, 2e-8) if index < 3 else torch.zeros_like(p),
        }
        for index, p in enumerate(params[:5])
    }
    group = {"lr": 0.05, "betas": (0.965, 0.99), "rho": 0.05, "weight_decay": 0.1}
    saved = {
        "state": state,
        "param_groups": [{**group, "params": [0, 1, 3, 5]}, {**group, "weight_decay": 0.0, "params": [2, 4, 6]}],
    }
    optimizer = SophiaG([{"params": [params[i] for i in g["params"]]} for g in saved["param_groups"]])
    optimizer.load_state_dict(official_state_dict(saved, predictions=490_001, bs=490_001))
    assert optimizer.state[params[0]]["hessian"].dtype == torch.float32
    exact = state[0]["hessian"].double() * 490_001  # rounded to bf16, it would be another number
    torch.testing.assert_close(optimizer.state[params[0]]["hessian"].double(), exact, rtol=1e-6, atol=0)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.refreshes == 3
    assert not optimizer.curvature_due

    tokens = torch.randint(0, 11, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    old = [p.detach().clone() for p in params]
    for inputs in tokens:
        optimizer.refresh_curvature(lambda inputs=inputs: model[1](model[2](model[0](inputs))))
        F.cross_entropy(model[1](model[2](model[0](inputs))).flatten(0, 1), inputs.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Those without curvature wait for the next refresh; one without a gradient does not move anyway.
    assert [not torch.equal(p, before) for p, before in zip(params, old, strict=True)] == [True] * 3 + [False] * 4
    assert not torch.equal(optimizer.state[params[3]]["exp_avg"], torch.full_like(params[3], 1e-3).float())


@pytest.mark.parametrize(("steps", "warned"), [(9, False), (10, True)])
def test_official_checkpoint_that_was_never_refreshed(steps, warned):
    saved = Official(THETA, rho=0.05, **RULE).state_dict()
    saved["state"][0].update(step=torch.tensor(float(steps)), exp_avg=THETA.clone())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = official_state_dict(saved, predictions=100)
    assert [("sign momentum" in str(one.message), one.filename == __file__) for one in caught] == [
        (True, True)
    ] * warned
    p = nn.Parameter(THETA.clone())
    optimizer = SophiaG([p])
    optimizer.load_state_dict(converted)
    assert optimizer.curvature_due
    assert optimizer.refreshes == 0
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="without a curvature refresh"):
        optimizer.step()


def damaged(**changes):
    saved = Official(THETA.clone(), rho=0.05, **RULE).state_dict()
    saved["state"][0].update(changes)
    return saved


STATE_ERRORS = [
    ({"model": {}, "optimizer": {}}, {}, r"no state dict .* 'model', 'optimizer': .* checkpoint\[\"optimizer\"\]"),
    ([1], {}, "but list"),
    (SophiaG([nn.Parameter(THETA)]).state_dict(), {}, "param group 0 is of this library already"),
    (torch.optim.AdamW([nn.Parameter(THETA)]).state_dict(), {}, "param group 0 has no 'rho', only 'lr', 'betas'"),
    (damaged(hessian=THETA.abs() / 0), {}, "hessian of parameter 0 has entries that are not finite"),
    (damaged(hessian=THETA), {}, "hessian of parameter 0 has entries that are not finite or negative"),
    (damaged(), {"predictions": 0}, "predictions=0 must be a finite number above 0"),
    (damaged(), {"bs": -1}, "bs=-1 must be"),
    (damaged(), {"curvature_interval": 0}, "curvature_interval=0 must be a whole number of steps"),
]


@pytest.mark.parametrize(("saved", "changes", "message"), STATE_ERRORS)
def test_state_errors(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        official_state_dict(saved, **{"predictions": 100, **changes})


def test_an_unconverted_state_dict_is_refused():
    with pytest.raises(ValueError, match="official_state_dict"):
        SophiaG([nn.Parameter(THETA.clone())]).load_state_dict(damaged())
