"""What SophiaK is with parts of it taken away: SophiaG, Muon, SOAP, AdamW."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.adamw import adamw

from sophia import SophiaG, SophiaK
from sophia.curvature import GaussNewtonBartlett
from sophia.optim import adam_step
from sophia.optim.matrix_update import MatrixRule, bound, direction
from sophia.optim.soap import SOAP
from tests.baselines.references import newton_schulz
from tests.regression import regression, train
from tests.sophia_k import drawn, nets

PLAIN = {"orthogonalize": 0, "update_rms": None, "nesterov": False}
AS_SOPHIA_G = {"basis": "none", "exponent": 1.0, "others": "curvature", **PLAIN}
AS_MUON = {"basis": "none", "clip": False, "exponent": 0.0, "diagonal": "gradients", "update_rms": 0.2}
AS_SOAP = {
    "basis": "both",
    "factors": "gradients",
    "diagonal": "gradients",
    "exponent": 0.5,
    "gamma": 1.0,
    "eps": 1e-30,
    "clip": False,
    "others": "gradients",
    "rtol": 0.0,
    **PLAIN,
}


# ---- SophiaG


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5,)], ids=str)
def test_without_basis_it_is_sophia_g(shape, maximize):
    """With bias-corrected curvature; a hidden matrix takes the root of the diagonal as its one sampled gradient."""
    theta, grads, estimates = drawn.draw(shape)
    settings = {"lr": 0.05, "betas": (0.9, 0.8), "gamma": 0.3, "weight_decay": 0.2, "maximize": maximize}
    one, other = nn.Parameter(theta.clone()), nn.Parameter(theta.clone())
    matrix = len(shape) == 2
    k = SophiaK([one], **settings, **AS_SOPHIA_G)
    g = SophiaG([other], **settings, bias_correction=True)
    for gradient, sampled in zip(grads, estimates, strict=True):
        if sampled is not None:
            diagonal = sampled.square().sum(0) if matrix else sampled
            assert k.update_curvature([diagonal.sqrt().unsqueeze(0) if matrix else diagonal])
            assert g.update_curvature([diagonal])
        one.grad, other.grad = gradient.clone(), gradient.clone()
        k.step()
        g.step()
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    for name in ("step", "refreshes", "exp_avg", "hessian"):
        torch.testing.assert_close(k.state[one][name], g.state[other][name], rtol=1e-14, atol=0)
    assert k.stats().keys() == g.stats().keys()
    for name, value in g.stats().items():
        torch.testing.assert_close(k.stats()[name], value, rtol=1e-6, atol=0, msg=name)
    assert 0.1 < float(k.stats()["clip_fraction"]) < 0.9


def test_without_basis_it_is_sophia_g_by_the_same_refreshes():
    """The same sampled gradients, to the last bit but for the order of sums."""
    settings = {"lr": 1e-2, "curvature_interval": 3, "seed": 5, "gamma": 0.1, "betas": (0.9, 0.9), "weight_decay": 0.1}
    models = []
    for kind, own in ((SophiaK, AS_SOPHIA_G), (SophiaG, {"bias_correction": True})):
        model, inputs, labels = regression(torch.float64)
        estimator = GaussNewtonBartlett(noise="signs")  # the default of SophiaK alone
        train(model, kind(model.parameters(), estimator=estimator, **settings, **own), inputs, labels, 8)
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---- Muon


def _step(p, optimizer, gradient):
    before = p.detach().clone()
    p.grad = gradient.clone()
    optimizer.step()
    return p.detach() - before


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)], ids=str)
def test_without_curvature_it_is_muon(shape, nesterov):
    """But for two things, on purpose: torch's iterates in bf16, and its length is 0.2 √max(rows, columns) times what
    five rounds leave of the singular values, about 1, where SophiaK's root mean square is `update_rms` exactly."""
    theta, grads, _ = drawn.draw(shape)
    settings = {"lr": 0.05, "weight_decay": 0.1}
    one, other = nn.Parameter(theta.clone()), nn.Parameter(theta.clone())
    k = SophiaK([one], betas=(0.9, 0.95), nesterov=nesterov, **settings, **AS_MUON)
    muon = torch.optim.Muon([other], momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw", **settings)
    assert not k.curvature_due
    momentum, expected = 0.0, theta.numpy().copy()
    for gradient in grads:
        g = gradient.numpy()
        momentum = 0.9 * momentum + 0.1 * g
        update = newton_schulz(0.9 * momentum + 0.1 * g if nesterov else momentum)
        update *= 0.2 / np.sqrt(np.mean(update**2))
        expected = expected - 0.05 * (update + 0.1 * expected)
        decay = 0.05 * 0.1
        ours, theirs = (
            _step(p, opt, gradient) + decay * p0
            for p, opt, p0 in (
                (one, k, one.detach().clone()),
                (other, muon, other.detach().clone()),
            )
        )
        torch.testing.assert_close(one.detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
        rms = theirs.square().mean().sqrt() / 0.05
        assert 0.2 * 0.7 < rms < 0.2 * 1.2
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert cosine > 0.99  # bf16 loses most where singular values are small


# ---- SOAP

INTERVAL = 5


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)], ids=str)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_of_gradients_alone_it_is_soap_until_the_basis_moves(shape, beta1):
    """SOAP's momentum is bias-corrected, so its steps are longer by 1 / (1 − β1ᵗ). When the basis moves, its squares go
    with the columns, and SophiaK's are carried: then they part."""
    theta, grads, _ = drawn.draw(shape)
    one, other = nn.Parameter(theta.clone()), nn.Parameter(theta.clone())
    settings = {"lr": 0.05, "betas": (beta1, 0.9), "weight_decay": 0.0}
    k = SophiaK([one], curvature_interval=INTERVAL, **settings, **AS_SOAP)
    soap = SOAP([other], basis_interval=INTERVAL, **{**settings, "eps": 0.0})
    assert not k.curvature_due
    for t, gradient in enumerate(grads[: INTERVAL + 1], start=1):
        ours, theirs = _step(one, k, gradient), _step(other, soap, gradient)
        longer = 1 / (1 - beta1**t)
        if t <= INTERVAL:
            torch.testing.assert_close(ours * longer, theirs, rtol=1e-9, atol=1e-9, msg=f"step {t}")
        else:
            assert (ours * longer - theirs).abs().max() > 1e-4
        for side in ("row", "column"):
            torch.testing.assert_close(k.state[one][f"{side}_basis"], soap.state[other][f"{side}_basis"])
            torch.testing.assert_close(k.state[one][f"{side}_statistics"], soap.state[other][f"{side}_statistics"])
        if t < INTERVAL:
            torch.testing.assert_close(k.state[one]["exp_avg_sq"], soap.state[other]["exp_avg_sq"])


# ---- AdamW


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (7,)], ids=str)
def test_what_is_no_hidden_matrix_takes_adamws_steps(shape, hidden):
    """A hidden matrix without basis and clip and with p = ½ does, too, with the uncorrected momentum."""
    theta, grads, _ = drawn.draw(shape)
    one, other = nn.Parameter(theta.clone()), nn.Parameter(theta.clone())
    corrected = not hidden or len(shape) == 1
    betas = (0.9 if corrected else 0.0, 0.95)
    settings = {"lr": 0.05, "betas": betas, "weight_decay": 0.1}
    matrix = {name: AS_SOAP[name] for name in ("diagonal", "exponent", "gamma", "eps", "clip", *PLAIN)}
    k = SophiaK([one], **settings, nu=1.0, **({"basis": "none", **matrix} if hidden else {"hidden": False}))
    adamw = torch.optim.AdamW([other], **settings, eps=1e-8)
    for gradient in grads:
        _step(one, k, gradient)
        _step(other, adamw, gradient)
        torch.testing.assert_close(one, other, rtol=1e-12 if corrected else 1e-6, atol=1e-12 if corrected else 1e-6)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (7,)], ids=str)
def test_next_to_adams_rule_it_is_adams_rule(monkeypatch, shape, maximize):
    """torch's kernel, which takes ν = 1 alone, and our own arithmetic, which takes the others, are one rule."""
    calls = []
    monkeypatch.setattr(adam_step, "adamw", lambda params, *a, **k: calls.append(len(params)) or adamw(params, *a, **k))
    theta, grads, _ = drawn.draw(shape)
    settings = {"lr": 0.05, "weight_decay": 0.1, "hidden": False, "maximize": maximize}
    one, other, third = (nn.Parameter(theta.clone()) for _ in range(3))
    kernel, near, far = (SophiaK([p], nu=nu, **settings) for p, nu in ((one, 1.0), (other, 0.999999), (third, 0.9)))
    for count, gradient in enumerate(grads, start=1):
        for p, optimizer in ((one, kernel), (other, near), (third, far)):
            _step(p, optimizer, gradient)
        assert sum(calls) == count  # of the first alone
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (one - third).abs().max() > 1e-2
    for name in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(kernel.state[one][name], near.state[other][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("basis", ["none", "both"])
def test_an_exponent_of_nought_is_no_divisor(basis):
    """Neither the size of the gradients' squares nor a square of nothing counts: γ is the only bound of the clip."""
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    own = {"basis": basis, "diagonal": "gradients"} | ({} if basis == "none" else {"factors": "gradients"})
    optimizer = SophiaK([p], lr=1.0, exponent=0.0, gamma=2.0, weight_decay=0.0, **PLAIN, **own)
    gradient = torch.zeros(3, 4, dtype=torch.float64)
    gradient[0, 1], gradient[1, 2], gradient[2, 3] = 5.0, -100.0, 1e-3
    p.grad = gradient.clone()
    optimizer.step()
    expected = -(0.1 * gradient / 2.0).clamp(-1, 1)  # the first step is in the parameter's own basis
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("orthogonalize", [0, 5])
@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-26, 1e-40])
def test_a_momentum_next_to_nothing_does_not_blow_up(size, orthogonalize):
    """Of an expert, say, that nobody has used for a thousand steps."""
    rule = MatrixRule(
        gamma=0.2,
        eps=1e-12,
        exponent=1.0,
        clip=True,
        orthogonalize=orthogonalize,
        update_rms=0.2,
        rtol=1e-6,
        product_dtype=None,
    )
    x = torch.full((4, 6), size)
    u = direction(x, bound(torch.ones(4, 6), (None, None), rule), (None, None), rule)
    assert u.isfinite().all()
    assert u.square().mean().sqrt() < 0.25


def test_a_matrix_that_no_gradient_reaches_costs_no_second_pass():
    model = nets.build()
    spare = nn.Parameter(torch.ones(3, 4))
    optimizer = SophiaK([*nets.groups(model), {"params": [spare]}], curvature_interval=1)
    calls = []
    for step in range(3):
        before = model.calls
        optimizer.refresh_curvature(nets.forwards(model, nets.batch(step)[0]))
        calls.append(model.calls - before)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert calls[0] == 2 * calls[1] == 2 * calls[2]
