"""Small models with the traits that trouble a curvature refresh, and what the tests compare before and after."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG

FEATURES, CLASSES, VOCAB = 6, 5, 11


class Classifier(nn.Module):
    """BatchNorm (state that a forward pass changes) and dropout (a draw from the global generator)."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.inner = nn.Linear(FEATURES, 16, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(16, CLASSES)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.outer(self.dropout(torch.tanh(self.norm(self.inner(x)))))


@dataclass
class Output:
    """What Hugging Face's models return, in short."""

    logits: Tensor
    loss: Tensor | None = None


class Tagger(nn.Module):
    """One label a position, compared where it stands."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens, labels=None):
        logits = self.head(torch.tanh(self.embed(tokens)))
        return Output(logits, None if labels is None else self.loss(logits, labels))

    def loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TinyForCausalLM(Tagger):
    """Position t is compared with label t + 1, inside the model."""

    def loss(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def seeded(build, seed=0):
    """A model, the same for the same seed; the global generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def examples(rows=12, seed=1):
    """Inputs [rows, FEATURES] and labels [rows] for a Classifier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (rows,), generator=generator)


def sentences(rows=12, length=6, seed=1):
    """Tokens and labels [rows, length] for a Tagger; about a third of the labels is −100."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, length), generator=generator)
    labels = torch.randint(0, VOCAB, (rows, length), generator=generator)
    return tokens, labels.masked_fill(torch.rand(rows, length, generator=generator) < 0.3, -100)


def in_the_middle(kind=SophiaG, **settings):
    """A model and its optimizer after two steps, with gradients, due for a refresh."""
    model = seeded(lambda: Classifier(dropout=0))
    optimizer = kind(model.parameters(), curvature_interval=2, **settings)
    x, y = examples()
    for _ in range(2):
        optimizer.refresh_curvature(lambda: model(x) if kind is SophiaG else F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def same(one, other):
    """Bit for bit: −0 differs from 0, and a NaN equals itself."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def curvature(optimizer):
    """h of all parameters, None where there is none."""
    return [optimizer.state.get(p, {}).get("hessian") for group in optimizer.param_groups for p in group["params"]]


def assert_same(ones, others):
    ones, others = list(ones), list(others)
    assert len(ones) == len(others)
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        assert same(one, other), f"item {index} differs: {one} and {other}"


class Snapshot:
    """All that an optimizer owns or steps on, to be found again as it was."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.values = [p.detach().clone() for p in self.params]
        self.grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in self.params]
        self.state = {p: copy.deepcopy(dict(optimizer.state[p])) for p in self.params if p in optimizer.state}
        self.groups = [self._settings(group) for group in optimizer.param_groups]
        self.generator = torch.get_rng_state()

    @staticmethod
    def _settings(group):
        return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}

    def assert_unchanged(self):
        """Parameters, .grad (the objects and what they hold), state, settings with the clock, and the generator."""
        optimizer = self.optimizer
        assert_same([p for group in optimizer.param_groups for p in group["params"]], self.values)
        for p, (grad, value) in zip(self.params, self.grads, strict=True):
            assert p.grad is grad
            assert same(p.grad, value)
        assert {p for p in optimizer.state if optimizer.state[p]} == {p for p, state in self.state.items() if state}
        for p, state in self.state.items():
            assert optimizer.state[p].keys() == state.keys()
            assert_same(optimizer.state[p].values(), state.values())
        assert [self._settings(group) for group in optimizer.param_groups] == self.groups
        assert same(torch.get_rng_state(), self.generator)
