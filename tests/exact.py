"""A transformer small enough for exact curvature, and that curvature by torch.func, in float64."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.curvature import Refresh
from sophia.optim.replicas import Replicas

VOCAB, CONTEXT, WIDTH, BATCH = 11, 6, 8, 8


class TinyTransformer(nn.Module):
    """One block of causal attention and MLP, tied head."""

    def __init__(self, outputs=None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = None if outputs is None else nn.Linear(WIDTH, outputs)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)  # [batch, one head, time, width]
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.mlp(x)
        return x @ self.embed.weight.T if self.head is None else self.head(x)


def build(outputs=None, dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyTransformer(outputs).to(dtype)
        tokens = torch.randint(0, VOCAB, (BATCH, CONTEXT))
        targets = torch.randint(0, VOCAB, (BATCH, CONTEXT))
    return model, tokens, targets


def refresh(step=0, seed=0, rows=None, scale=1.0):
    return Refresh(seed=seed, step=step, scale=scale, replicas=Replicas(None, "mean"), rows=rows)


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def exact_gauss_newton(model, tokens, output_hessian, mask=None):
    """Diagonal of Jᵀ (∂²L/∂z²) J over the counted predictions, for the mean loss; [parameters]."""
    params = dict(model.named_parameters())

    def outputs(values):
        return torch.func.functional_call(model, values, (tokens,))

    logits = outputs(params).detach()
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(outputs)({k: v.detach() for k, v in params.items()})
    jacobian = torch.cat([j.reshape(*logits.shape, -1) for j in jacobian.values()], -1).flatten(0, 1)  # [n, v, p]
    hessian = output_hessian(logits.flatten(0, 1))  # [n, v, v]
    per_prediction = torch.einsum("nvp,nvw,nwp->np", jacobian, hessian, jacobian)
    if mask is not None:
        per_prediction = per_prediction[mask.flatten()]
    return per_prediction.mean(0)


def categorical_hessian(logits, real=None):
    probs = logits[:, :real].softmax(-1)
    hessian = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    pad = logits.shape[-1] - probs.shape[-1]
    return F.pad(hessian, (0, pad, 0, pad))


def exact_hessian(model, loss):
    """Diagonal of the Hessian of loss(model called with these parameters)."""
    params = {k: v.detach() for k, v in model.named_parameters()}
    sizes = [v.numel() for v in params.values()]

    def of_vector(vector):
        pieces = vector.split(sizes)
        values = {k: piece.view_as(v) for (k, v), piece in zip(params.items(), pieces, strict=True)}
        return loss(lambda *args: torch.func.functional_call(model, values, args))

    # The attention kernels have no second derivative; the formula does.
    with sdpa_kernel(SDPBackend.MATH):
        vector = flat(params.values())
        rows = [torch.func.jvp(torch.func.grad(of_vector), (vector,), (unit,))[1] for unit in torch.eye(len(vector))]
    return torch.stack([row[i] for i, row in enumerate(rows)])


def samples(estimator, forwards, model, count, **settings):
    """Independent estimates, [count, parameters]."""
    params = list(model.parameters())
    return torch.stack(
        [flat(estimator.estimate(forwards, params, refresh(step=step, **settings))) for step in range(count)]
    )


def assert_unbiased(drawn, exact, model, bound=0.09):
    """The mean over samples equals the exact diagonal, tensor by tensor and as a whole.

    Sums over tensors are compared: 5 standard errors must hold the difference, and must be less than `bound` of the
    exact value for the whole, so that a factor of 1.1 cannot pass.
    """
    sizes = [p.numel() for p in model.parameters()]
    whole = None
    for values, truth in (
        *zip(drawn.split(sizes, -1), exact.split(sizes), strict=True),
        (drawn, exact),
    ):
        sums = values.sum(-1)
        error = (sums.mean() - truth.sum()).abs().item()
        standard = (sums.std() / math.sqrt(len(sums))).item()
        assert error <= 5 * standard + 1e-12, f"off by {error / max(standard, 1e-300):.1f} standard errors"
        whole = 5 * standard / truth.sum().abs().item()
    assert whole < bound, f"the test could not see a factor of 1.1: its own noise is {whole:.3f}"


def relative_squared_error(drawn, exact):
    """E Σ Δ² / Σ exact²: 2 for one chunk."""
    return ((drawn - exact).square().sum(-1).mean() / exact.square().sum()).item()
