"""A GPT-2 written out: one loop over heads and positions, float64, nothing fused. What the fast one must equal."""

import math

import torch


def plain_logits(model, tokens):
    """Logits [batch, time, vocab_size] of `sophia.model.GPT`, from its weights and settings alone."""
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    config = model.config
    rows = [_one(weights, config, ids) for ids in tokens.tolist()]
    return torch.stack(rows)


def _one(weights, config, ids):
    x = weights["tokens.weight"][ids] + weights["positions.weight"][: len(ids)]  # [time, width]
    for layer in range(config.layers):
        at = f"blocks.{layer}."
        x = x + _attention(weights, config, at + "attention.", _norm(weights, at + "attention_norm", x), layer)
        hidden = _linear(weights, at + "feed_forward.expand", _norm(weights, at + "feed_forward_norm", x))
        x = x + _linear(weights, at + "feed_forward.output", _gelu(hidden, config.activation))
    return _norm(weights, "final_norm", x) @ weights["tokens.weight"][: config.vocab_size].T


def _attention(weights, config, at, x, layer):
    size = config.width // config.heads
    q, k, v = _linear(weights, at + "queries_keys_values", x).split(config.width, dim=1)
    divisor = math.sqrt(size) * (layer + 1 if config.attention_scale_by_layer else 1)
    mixed = torch.empty_like(x)
    for head in range(config.heads):
        part = slice(head * size, (head + 1) * size)
        for time in range(len(x)):
            scores = k[: time + 1, part] @ q[time, part] / divisor
            mixed[time, part] = scores.softmax(0) @ v[: time + 1, part]
    return _linear(weights, at + "output", mixed)


def _linear(weights, at, x):
    return x @ weights[at + ".weight"].T + weights.get(at + ".bias", 0)


def _norm(weights, at, x):
    deviation = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(1, keepdim=True)) / deviation * weights[at + ".weight"] + weights.get(at + ".bias", 0)


def _gelu(x, kind):
    if kind == "gelu":
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
