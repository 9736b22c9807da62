"""Steps, the phase of the refreshes, and what happens when curvature is missing or old."""

import warnings

import pytest
import torch
from torch import nn

from sophia import Sophia, SophiaG, SophiaH
from tests import exact


def quadratic(**settings):
    """One parameter with a gradient of ones, and an optimizer that takes curvature by hand."""
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    return p, Sophia([p], lr=0.1, **settings)


def logits_of(model, tokens):
    return lambda: model(tokens)


def test_due_at_every_multiple_of_the_interval():
    _, optimizer = quadratic(curvature_interval=4)
    due = []
    for _ in range(13):
        due.append(optimizer.curvature_due)
        if optimizer.curvature_due:
            optimizer.update_curvature([torch.ones(3)])
        assert not optimizer.curvature_due
        optimizer.step()
    assert [t for t, d in enumerate(due) if d] == [0, 4, 8, 12]


def test_due_until_accepted_and_late_is_allowed():
    _, optimizer = quadratic(curvature_interval=5)
    optimizer.update_curvature([torch.ones(3)])
    for _ in range(5):
        optimizer.step()
    for _ in range(3):  # t = 5, 6, 7: due, and left alone
        assert optimizer.curvature_due
        optimizer.step()
    optimizer.update_curvature([torch.ones(3)])
    assert not optimizer.curvature_due
    optimizer.step()
    assert not optimizer.curvature_due  # t = 9
    optimizer.step()
    assert optimizer.curvature_due  # t = 10: the grid is that of the clock, not of the last refresh


def test_interval_one_refreshes_every_step():
    """Trap 8: an interval of 1 crashes elsewhere."""
    model, tokens, _ = exact.build()
    optimizer = SophiaG(model.parameters(), curvature_interval=1)
    for _ in range(3):
        assert optimizer.refresh_curvature(logits_of(model, tokens))
        assert not optimizer.refresh_curvature(logits_of(model, tokens))
        model(tokens).sum().backward()
        optimizer.step()


def test_second_refresh_in_a_block_returns_false_without_calling_forward():
    model, tokens, _ = exact.build()
    optimizer = SophiaG(model.parameters())
    assert optimizer.refresh_curvature(logits_of(model, tokens)) is True

    def forbidden():
        raise AssertionError("forward was called although no refresh was due")

    assert optimizer.refresh_curvature(forbidden) is False


def test_trap_4_first_refresh_is_at_step_zero_before_the_update():
    """The first step is not blind: it uses an estimate at the same parameters as its gradient."""
    p, optimizer = quadratic()
    optimizer.update_curvature([torch.full((3,), 1e4)])
    optimizer.step()
    # m / (γ h) = 0.04 / (0.05 · 0.01 · 1e4) = 0.008: not the sign.
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.1 * 0.008))


def test_trap_8_estimate_is_folded_in_at_once():
    p, optimizer = quadratic(betas=(0.0, 0.9))
    optimizer.update_curvature([torch.full((3,), 2.0)])
    assert torch.allclose(optimizer.state[p]["hessian"], torch.tensor(0.2))
    for _ in range(10):
        optimizer.step()
    optimizer.update_curvature([torch.full((3,), 4.0)])
    assert torch.allclose(optimizer.state[p]["hessian"], torch.tensor(0.9 * 0.2 + 0.4))


def test_update_curvature_always_folds_and_counts():
    p, optimizer = quadratic(betas=(0.0, 0.5))
    assert optimizer.update_curvature([torch.ones(3)])
    assert optimizer.update_curvature([torch.ones(3)])
    assert torch.allclose(optimizer.state[p]["hessian"], torch.tensor(0.75))
    assert not optimizer.curvature_due


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_trap_3_stepping_without_refresh_raises_and_says_what_to_add(kind):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = kind([p])
    with pytest.raises(RuntimeError, match=r"optimizer\.refresh_curvature\(lambda: .*model\(inputs\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_with_every_lr_zero_the_first_step_only_creates_state():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([{"params": [p]}, {"params": [q]}], lr=0.0)
    p.grad, q.grad = torch.ones(3), torch.ones(2)
    optimizer.step()
    for parameter in (p, q):
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "hessian"}
        assert all(not value.any() for value in optimizer.state[parameter].values())
        assert torch.equal(parameter, torch.ones_like(parameter))
    assert optimizer.curvature_due
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="refresh_curvature"):
        optimizer.step()


def test_trainable_parameters_without_gradient_have_state_for_checkpoints():
    """An unused expert: a distributed checkpoint that lacks its state could not be loaded again."""
    used, expert, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = Sophia([used, expert, frozen])
    optimizer.update_curvature([torch.ones(2), None, None])
    used.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state) == {used, expert}
    assert optimizer.state[expert]["step"] == 0


def test_a_warmup_from_zero_is_an_ordinary_step_once_refreshed():
    p, optimizer = quadratic()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.update_curvature([torch.ones(3)])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].eq(0.04).all()
    assert optimizer.state[p]["step"] == 1


def test_refused_refreshes_build_momentum_and_hold_parameters():
    p, optimizer = quadratic()
    p.data += 5  # weight decay would show
    assert optimizer.update_curvature([torch.full((3,), torch.inf)]) is False
    assert optimizer.curvature_due
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 5.0))
    assert torch.allclose(optimizer.state[p]["exp_avg"], torch.tensor(0.04))
    assert optimizer.stats()["refused_refreshes"] == 1
    optimizer.update_curvature([torch.ones(3)])
    optimizer.step()
    assert (p < 5).all()
    assert optimizer.state[p]["step"] == 2


def test_one_nonfinite_estimate_refuses_all():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = Sophia([p, q])
    optimizer.update_curvature([torch.ones(3), torch.ones(2)])
    before = [optimizer.state[t]["hessian"].clone() for t in (p, q)]
    assert not optimizer.update_curvature([torch.ones(3), torch.tensor([1.0, torch.nan])])
    assert all(torch.equal(optimizer.state[t]["hessian"], b) for t, b in zip((p, q), before, strict=True))


def test_unreached_parameters_hold_and_are_named_once():
    used, expert = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([("trunk.weight", used), ("expert.weight", expert)], lr=0.1)
    used.grad, expert.grad = torch.ones(3), torch.ones(2)
    optimizer.update_curvature([torch.ones(3), None])
    with pytest.warns(UserWarning, match=r"expert\.weight") as caught:
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1
    assert "trunk" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert torch.equal(expert, torch.ones(2))
    assert (used < 1).all()
    optimizer.update_curvature([None, torch.ones(2)])
    optimizer.step()
    assert (expert < 1).all()
    assert optimizer.stats()["clip_fraction"].isfinite()


def test_zero_curvature_that_was_reached_moves():
    """Reached with an estimate of zero is not the same as never reached, also after a reload."""
    p, optimizer = quadratic(weight_decay=0.0)
    optimizer.update_curvature([torch.zeros(3)])
    copy = nn.Parameter(p.detach().clone())
    other = Sophia([copy], lr=0.1, weight_decay=0.0)
    other.load_state_dict(optimizer.state_dict())
    copy.grad = torch.ones(3)
    optimizer.step()
    other.step()
    assert torch.equal(p, torch.full((3,), -0.1))
    assert torch.equal(copy, p)


def test_the_mark_of_unreached_curvature_survives_a_reload():
    used, expert = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    used.grad, expert.grad = torch.ones(3), torch.ones(2)
    optimizer = Sophia([used, expert], lr=0.1)
    optimizer.update_curvature([torch.ones(3), None])
    with pytest.warns(UserWarning, match="hold still"):
        optimizer.step()
    assert torch.equal(optimizer.state[expert]["hessian"], torch.zeros(2))
    again = Sophia([used, expert], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    before = used.detach().clone()
    again.step()
    assert torch.equal(expert, torch.ones(2))
    assert not torch.equal(used, before)


def test_stale_curvature_warns_once():
    _, optimizer = quadratic(curvature_interval=2)
    optimizer.update_curvature([torch.ones(3)])
    for _ in range(20):
        optimizer.step()
    with pytest.warns(UserWarning, match="21 steps old") as caught:
        for _ in range(30):
            optimizer.step()
    assert len(caught) == 1


def test_regular_refreshes_never_warn():
    _, optimizer = quadratic(curvature_interval=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            if optimizer.curvature_due:
                optimizer.update_curvature([torch.ones(3)])
            optimizer.step()


def test_stats_are_lazy_device_scalars():
    _, optimizer = quadratic(gamma=1.0, betas=(0.0, 0.0))
    optimizer.update_curvature([torch.tensor([0.5, 2.0, 4.0])])
    optimizer.step()
    optimizer.step()
    stats = optimizer.stats()
    assert all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in stats.values())
    assert stats["clip_fraction"] == pytest.approx(1 / 3)
    assert stats["momentum_norm"] == pytest.approx(3**0.5)
    assert stats["curvature_norm"] == pytest.approx((0.25 + 4 + 16) ** 0.5)
    assert stats["curvature_age"] == 2
    assert stats["refused_refreshes"] == 0


def test_clipped_is_beyond_the_larger_of_gamma_h_and_eps():
    p, optimizer = quadratic(betas=(0.0, 0.0), eps=1.0, gamma=1.0)
    p.grad = torch.tensor([1.0, 1.5, -3.0])
    optimizer.update_curvature([torch.tensor([0.1, 0.1, 3.0])])
    optimizer.step()
    assert optimizer.stats()["clip_fraction"] == pytest.approx(1 / 3)  # |m| = bound is not clipped


def test_the_clock_survives_a_state_dict_round_trip():
    """Trap 14: a resume that forgets the phase."""
    p, optimizer = quadratic(curvature_interval=4, seed=7)
    optimizer.update_curvature([torch.ones(3)])
    for _ in range(6):
        optimizer.step()
    q = nn.Parameter(p.detach().clone())
    other = Sophia([q])
    other.load_state_dict(optimizer.state_dict())
    assert other.curvature_due
    assert other.stats()["curvature_age"] == 6
    other.update_curvature([torch.ones(3)])
    q.grad = torch.ones(3)
    due = []
    for _ in range(4):
        due.append(other.curvature_due)
        other.step()
    assert due == [False, False, True, True]  # t = 6, 7, 8, 9
    assert other.param_groups[0]["seed"] == 7
