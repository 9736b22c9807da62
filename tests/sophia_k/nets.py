"""A small net with two hidden matrices, its sampled gradients by hand, and its training loop."""

import torch
from torch import nn
from torch.nn import functional as F

from sophia.optim.curvature.likelihood import output_noise
from sophia.optim.noise import row_keys, stream_key

FEATURES, WIDTH, CLASSES, ROWS = 6, 7, 5, 20


class Net(nn.Module):
    """Two hidden layers and an output head; counts its forward passes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(CLASSES, CLASSES)
        self.calls = 0

    def body(self, x):
        self.calls += 1
        return torch.tanh(self.second(self.dropout(torch.tanh(self.first(x)))))

    def forward(self, x):
        return self.head(self.body(x))


def build(dtype=torch.float64, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**settings).to(dtype)


def groups(model, **head):
    """Hidden layers, and the head in a group of its own."""
    hidden = [*model.first.parameters(), *model.second.parameters()]
    return [{"params": hidden}, {"params": [*model.head.parameters()], "hidden": False, **head}]


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def batch(step=0, dtype=torch.float64, rows=ROWS):
    """Inputs and labels."""
    source = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, FEATURES, generator=source, dtype=torch.float64) * torch.linspace(2, 0.5, FEATURES)
    return x.to(dtype), torch.randint(0, CLASSES, (rows,), generator=source)


def forwards(model, x, size=4):
    """One for each `size` rows: as many chunks."""
    return [lambda part=part: model(part) for part in x.split(size)]


def train(model, optimizer, steps, start=0):
    """The loop, with the batches of steps start, start + 1, …"""
    for step in range(start, start + steps):
        x, y = batch(step, model.head.weight.dtype)
        optimizer.refresh_curvature(forwards(model, x))
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()


def sampled(chunks, params, *, seed=0, step=0, kind="signs"):
    """S_c / √N of every parameter, stacked over the chunks [(inputs' logits, mask or None)], by autograd alone."""
    gradients, total, row = [], 0, 0
    for logits, mask in chunks:
        keys = row_keys(stream_key(seed, step, 0), torch.arange(row, row + len(logits)))
        shown = None if mask is None else mask.unsqueeze(1)
        noise = output_noise(
            logits.detach().unsqueeze(1), shown, keys, likelihood="categorical", kind=kind, vocab_size=None
        )
        gradients.append(torch.autograd.grad(logits, params, noise.squeeze(1)))
        total += len(logits) if mask is None else int(mask.sum())
        row += len(logits)
    return [torch.stack(of_one) / total**0.5 for of_one in zip(*gradients, strict=True)]
