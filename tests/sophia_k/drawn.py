"""Gradients and sampled gradients for SophiaK, and a run of it beside the reference."""

import torch

from sophia import SophiaK
from tests.sophia_k.reference import Parameter

STEPS = 12
REFRESHED = (0, 3, 7)  # steps at whose beginning sampled gradients are folded in
CHUNKS = 7  # so many that the statistics of all sides have full rank
INTERVAL = 6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(shape, draw):
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def draw(shape, dtype=torch.float64, seed=0, chunks=CHUNKS):
    """θ, a gradient for each step, and for each step S_c / √N or None: large in some directions, across the axes."""
    source = generator(seed)
    theta = normal(shape, source).to(dtype)
    if len(shape) != 2:
        grads = [normal(shape, source).to(dtype) for _ in range(STEPS)]
        return (
            theta,
            grads,
            [normal(shape, source).square().to(dtype) if t in REFRESHED else None for t in range(STEPS)],
        )
    left, right = (torch.linalg.qr(normal((size, size), source))[0] for size in shape)
    scales = [torch.linspace(1.5, 0.5, size, dtype=torch.float64) for size in shape]

    def sampled(*count, size=1.0):
        core = normal((*count, *shape), source) * scales[0].unsqueeze(-1) * scales[1]
        return (size * left @ core @ right.T).to(dtype)

    # So large that some coordinates are clipped and some are not.
    estimates = [sampled(chunks, size=0.3) if t in REFRESHED else None for t in range(STEPS)]
    return theta, [sampled() for _ in range(STEPS)], estimates


def bases(optimizer, p):
    """(Q_R, Q_C) as numpy arrays, None for a side that is not turned."""
    own = optimizer.state[p]
    found = (own.get(f"{side}_basis") for side in ("row", "column"))
    return [None if q is None else q.cpu().double().numpy() for q in found]


def advance(optimizer, params, references, rows):
    """Steps from (gradients, estimates or None) by the optimizer and by the references, which borrow singular bases."""
    for grads, estimates in rows:
        if estimates is not None:
            assert optimizer.update_curvature(estimates)
            for p, reference, estimate in zip(params, references, estimates, strict=True):
                reference.refresh(None if estimate is None else estimate.cpu().double().numpy(), bases(optimizer, p))
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
        for p, reference, grad in zip(params, references, grads, strict=True):
            if grad is not None:
                reference.step(grad.cpu().double().numpy(), bases(optimizer, p))


def run(theta, grads, estimates, device="cpu", fused=False, **settings):
    """One parameter after all steps: itself, the optimizer, the reference."""
    p = torch.nn.Parameter(theta.clone().to(device))
    optimizer = SophiaK([p], fused=fused, **settings)
    reference = Parameter(theta.double().numpy(), **settings)
    rows = [([g.to(device)], None if e is None else [e.to(device)]) for g, e in zip(grads, estimates, strict=True)]
    advance(optimizer, [p], [reference], rows)
    return p, optimizer, reference
