"""Text from a trained model: one token at a time, drawn from its predictions."""

import torch
from torch import Tensor

from sophia.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt_tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt.

    Args:
        model: Gives the logits; it sees at most its context's worth of the latest tokens.
        prompt_tokens: Ids to continue, [batch, time] with at least one token each.
        max_new_tokens: How many tokens to add.
        temperature: Divides the logits before sampling; 0 always takes the likeliest token.
        top_k: Sample among the ``top_k`` likeliest tokens only; None means all of them.
        generator: Source of the randomness, on the model's device; None is torch's global one.

    Returns:
        Prompt and continuation, [batch, time + max_new_tokens].

    Raises:
        ValueError: The prompt is empty or not two-dimensional, or a setting is out of its range.
    """
    if prompt_tokens.ndim != 2 or prompt_tokens.shape[1] == 0:
        shape = list(prompt_tokens.shape)
        raise ValueError(f"prompt_tokens has shape {shape}; give [batch, time] with one token or more")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must not be negative")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest token) or positive")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all tokens")

    was_training = model.training
    model.eval()
    try:
        tokens = prompt_tokens
        for _ in range(max_new_tokens):
            logits = model(tokens[:, -model.config.context :])[:, -1].float()  # [batch, vocab]
            tokens = torch.cat([tokens, _draw(logits, temperature, top_k, generator)], dim=1)
        return tokens
    finally:
        model.train(was_training)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Choose one id a row: logits [batch, vocab] -> ids [batch, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
        choice = torch.multinomial((values / temperature).softmax(dim=-1), 1, generator=generator)
        return ids.gather(1, choice)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
