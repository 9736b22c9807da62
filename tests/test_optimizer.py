"""What torch's own suite checks of every optimizer, for ours."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import sophia
from sophia import Sophia, SophiaG, SophiaH
from tests import exact
from tests.regression import parameters_equal, regression, train


def test_the_public_signature_is_the_documented_one():
    expected = (
        "(params, lr=0.0006, betas=(0.96, 0.99), gamma={gamma}, eps=1e-12, weight_decay=0.2, curvature_interval=10, *, "
        "estimator=None, seed=0, process_group=None, gradient_reduction='mean', state_dtype=None, maximize=False, "
        "foreach=None, fused=None, capturable=False, bias_correction=False, clip_target=None)"
    )
    for kind, gamma in ((SophiaG, 0.05), (SophiaH, 0.01)):
        signature = inspect.signature(kind)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        plain = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert str(plain) == expected.format(gamma=gamma)
    assert list(inspect.signature(Sophia.attach).parameters) == ["self", "model", "logits", "mask", "max_batch"]
    assert str(inspect.signature(Sophia.refresh_curvature)).startswith("(self, forward")


def test_public_names():
    assert sorted(sophia.__all__) == ["Sophia", "SophiaG", "SophiaH", "SophiaK", "__version__", "convert", "curvature"]
    assert isinstance(SophiaG([nn.Parameter(torch.ones(1))]), torch.optim.Optimizer)


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_it_learns(kind):
    model, inputs, labels = regression()
    optimizer = kind(model.parameters(), lr=1e-2)
    first = F.cross_entropy(model(inputs), labels).item()
    for _ in range(200):
        if kind is SophiaH:
            optimizer.refresh_curvature(lambda: F.cross_entropy(model(inputs), labels))
        else:
            optimizer.refresh_curvature(lambda: model(inputs))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model(inputs), labels).item() < first / 4


def test_groups_have_their_own_settings():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Sophia(
        [{"params": [p], "lr": 0.5, "weight_decay": 0.0, "gamma": 1.0}, {"params": [q], "betas": (0.0, 0.0)}], lr=0.1
    )
    assert optimizer.param_groups[0]["betas"] == (0.96, 0.99)
    optimizer.update_curvature([torch.full((2,), 1e-3), torch.full((2,), 1e-3)])
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert torch.allclose(p, torch.tensor(0.5))  # clipped
    assert torch.allclose(q, torch.tensor(0.98 - 0.1))


def test_add_param_group_during_training():
    model, inputs, labels = regression()
    optimizer = SophiaG(model[0].parameters(), lr=1e-2)
    train(model, optimizer, inputs, labels, 3)
    late = [p.detach().clone() for p in model[2].parameters()]
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-3})
    train(model, optimizer, inputs, labels, 5)
    # Curvature for them comes at t = 10: until then they hold, without a warning, as no refresh has missed them.
    assert all(torch.equal(p, before) for p, before in zip(model[2].parameters(), late, strict=True))
    train(model, optimizer, inputs, labels, 5)
    assert not any(torch.equal(p, before) for p, before in zip(model[2].parameters(), late, strict=True))


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = Sophia([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="gamma=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "gamma": -1})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.stats()) == 5


def test_named_parameters_and_generators():
    model, _, _ = regression()
    assert SophiaG(model.named_parameters()).param_groups[0]["param_names"][0] == "0.weight"
    assert len(SophiaG(p for p in model.parameters()).param_groups[0]["params"]) == 4
    SophiaG([{"params": (p for p in model.parameters())}])


@pytest.mark.parametrize("foreach", [False, True])
def test_tensor_lr_equals_float_lr(foreach):
    results = []
    for lr in (0.01, torch.tensor(0.01)):
        model, inputs, labels = regression()
        train(model, SophiaG(model.parameters(), lr=lr, foreach=foreach), inputs, labels, 12)
        results.append(model)
    assert parameters_equal(*results)


def test_tensor_lr_is_read_at_every_step():
    model, inputs, labels = regression()
    lr = torch.tensor(0.01)
    optimizer = SophiaG(model.parameters(), lr=lr)
    train(model, optimizer, inputs, labels, 1)
    before = copy.deepcopy(model)
    lr.zero_()
    train(model, optimizer, inputs, labels, 1)
    assert parameters_equal(model, before)


@pytest.mark.parametrize(
    "build",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 20)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
        ),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]),
    ],
    ids=["lambda", "cosine", "onecycle", "sequential", "chained"],
)
def test_schedulers(build):
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=0.05)
    scheduler = build(optimizer)
    for _ in range(12):
        train(model, optimizer, inputs, labels, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] != 0.05
    assert all(p.isfinite().all() for p in model.parameters())


def test_onecycle_may_cycle_the_momentum():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=30)  # writes betas
    train(model, optimizer, inputs, labels, 1)
    scheduler.step()
    train(model, optimizer, inputs, labels, 1)


def test_trap_13_maximize_ascends_and_leaves_curvature_alone():
    down, inputs, labels = regression()
    up = copy.deepcopy(down)
    minimizer = SophiaG(down.parameters(), weight_decay=0)
    maximizer = SophiaG(up.parameters(), maximize=True, weight_decay=0)
    for model, optimizer, sign in ((down, minimizer, 1), (up, maximizer, -1)):
        optimizer.refresh_curvature(lambda model=model: model(inputs))
        (sign * F.cross_entropy(model(inputs), labels)).backward()
        optimizer.step()
    assert parameters_equal(down, up)
    for p, q in zip(down.parameters(), up.parameters(), strict=True):
        assert torch.equal(minimizer.state[p]["hessian"], maximizer.state[q]["hessian"])
        assert (maximizer.state[q]["hessian"] >= 0).all()


def test_parameters_without_gradient_are_left_alone():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Sophia([p, q, frozen], lr=0.1)
    optimizer.update_curvature([torch.ones(2), torch.ones(2), None])
    p.grad = torch.ones(2)
    optimizer.step()
    assert (p < 1).all()
    assert torch.equal(q, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2))
    assert frozen not in optimizer.state


def test_no_gradients_at_all_is_a_step_that_does_nothing():
    p = nn.Parameter(torch.ones(2))
    optimizer = Sophia([p])
    optimizer.update_curvature([torch.ones(2)])
    optimizer.step()
    assert torch.equal(p, torch.ones(2))


def test_tied_parameters_are_updated_once():
    model, tokens, targets = exact.build(dtype=torch.float32)  # embedding and head are one tensor
    optimizer = SophiaG(model.parameters(), lr=0.1, weight_decay=0)
    before = model.embed.weight.detach().clone()
    optimizer.refresh_curvature(lambda: model(tokens))
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()
    assert (model.embed.weight - before).abs().max() <= 0.1 * (1 + 1e-5)


def test_zero_size_and_scalar_parameters():
    empty, scalar = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(2.0))
    for foreach in (False, True):
        optimizer = Sophia([empty, scalar], lr=0.1, foreach=foreach)
        optimizer.update_curvature([torch.empty(0, 3), torch.tensor(1.0)])
        empty.grad, scalar.grad = torch.empty(0, 3), torch.tensor(1.0)
        optimizer.step()
        optimizer.stats()
    assert scalar < 2
    other = Sophia([empty, scalar])
    other.load_state_dict(optimizer.state_dict())
    other.step()


def test_state_has_the_layout_of_the_parameter():
    p = nn.Parameter(torch.randn(4, 6).t())
    optimizer = Sophia([p])
    optimizer.update_curvature([torch.ones(6, 4)])
    assert optimizer.state[p]["exp_avg"].stride() == optimizer.state[p]["hessian"].stride() == p.stride()


def test_complex_parameters_are_refused_clearly():
    with pytest.raises(ValueError, match=r"complex64.*view_as_complex"):
        Sophia([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 3, sparse=True)
    optimizer = Sophia([dense, table.weight], lr=0.1)
    optimizer.update_curvature([torch.ones(2), torch.ones(4, 3)])
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert optimizer.param_groups[0]["clock"] == 0


def test_closures():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    optimizer.refresh_curvature(lambda: model(inputs))
    first = optimizer.step(closure)
    for _ in range(30):
        optimizer.refresh_curvature(lambda: model(inputs))
        last = optimizer.step(closure)
    assert last < first
    assert optimizer.step() is None


def test_hooks():
    p = nn.Parameter(torch.ones(2))
    optimizer = Sophia([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    optimizer.update_curvature([torch.ones(2)])
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "load", "loaded"]


def test_repr_and_zero_grad():
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters())
    assert "gamma: 0.05" in repr(optimizer)
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


def test_anomaly_mode_and_deterministic_algorithms():
    model, inputs, labels = regression()
    torch.use_deterministic_algorithms(True)
    try:
        for noise in ("labels", "signs"):
            estimator = sophia.curvature.GaussNewtonBartlett(noise=noise)
            train(model, SophiaG(model.parameters(), estimator=estimator), inputs, labels, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autograd.set_detect_anomaly(True):
        train(model, SophiaG(model.parameters()), inputs, labels, 2)


def test_import_loads_nothing_beside_torch():
    # The last two are torch's own, and take longer to import than all of ours.
    extras = ("numpy", "rich", "tyro", "tokenizers", "matplotlib", "torch.distributed.tensor", "torch._dynamo")
    ours, torchs = (
        subprocess.run(
            [sys.executable, "-c", f"import sys, {name}; print([m for m in {extras} if m in sys.modules])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("sophia", "torch")
    )
    assert ours == torchs
