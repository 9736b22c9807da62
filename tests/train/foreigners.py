"""Optimizers and hooks of somebody else, good and bad ones, for tests by import path."""

import torch
from torch import nn

NOT_CALLABLE = 3


class Untidy(torch.optim.Optimizer):
    """Momentum with state of all kinds: numbers, lists, nested tensors, other dtypes; more where the hook wrote."""

    def __init__(self, params, lr, weight_decay=0.0, *, momentum=0.9, label=None):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "label": label})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "count" not in state:
                    state["count"], state["low"] = 0, torch.zeros_like(p, dtype=torch.bfloat16)
                    state["nested"] = {"pair": (torch.zeros_like(p), [None, "text", 0.5]), "none": []}
                state["count"] += 1
                average, rest = state["nested"]["pair"]
                rest[2] = rest[2] / 2 + 0.1
                average.mul_(group["momentum"]).add_(p.grad)
                state["low"].copy_(average * 0.9 + state["low"] * 0.1)
                noise = state.get("drawn", torch.zeros(()))
                p.add_((average + state["low"] + noise) / (1 + rest[2] / state["count"]), alpha=-group["lr"])


def draw(context):
    """Noise from the global generator, kept in the state; gradients are left behind."""
    context.loss(context.inputs[:1], context.targets[:1]).backward()
    for p in context.model.parameters():
        state = context.optimizer.state[p]
        if "count" in state:
            state["drawn"] = 0.1 * torch.randn(())


def refresh(context):
    """What a Sophia by import path needs."""
    context.optimizer.refresh_curvature(lambda: context.logits(context.inputs[:2]))


SEEN = []


def note(context):
    """Remember the context."""
    SEEN.append(context)


def broken_hook(context):
    if context.step == 2:
        raise RuntimeError("the sky\nis falling")


def easier_batch(context):
    if context.step == 1:
        context.targets[:, 1:] = context.inputs[:, :1]


class NoOptimizer(nn.Module):
    pass


class BrokenConstructor(torch.optim.SGD):
    def __init__(self, params, lr):
        raise KeyError("no luck")


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return closure()


class TwoWeights(torch.optim.SGD):
    """One that averages its weights apart, and wants to be told when they are evaluated."""

    def eval(self):
        pass


class BrokenStep(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)

    def step(self, closure=None):
        raise RuntimeError("out of steps")


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"rate": lr})


class Keywords(torch.optim.SGD):
    def __init__(self, params, **keywords):
        super().__init__(params, **keywords)


class OddState(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = {1, 2}


class OddKey(OddState):
    def step(self, closure=None):
        self.state["all"] = {"odd": 1}


class OddGroup(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.param_groups[0]["function"] = len


class OddDict(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)

    def state_dict(self):
        return {**super().state_dict(), "more": 1}
