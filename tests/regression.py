"""A small classification problem and the training loop of the optimizer's tests."""

import torch
from torch import nn
from torch.nn import functional as F


def regression(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        inputs, labels = torch.randn(32, 5).to(dtype), torch.randint(0, 3, (32,))
    return model, inputs, labels


def train(model, optimizer, inputs, labels, steps):
    for _ in range(steps):
        optimizer.refresh_curvature(lambda: model(inputs))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).float(), labels).backward()
        optimizer.step()


def parameters_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
