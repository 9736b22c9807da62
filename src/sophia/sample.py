"""Text from a trained model: one token at a time, drawn from its predictions."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sophia.cache import KeyValueCache
from sophia.model import GPT


def generate(
    model: GPT,
    prompt_tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Continue a prompt.

    A text longer than the model's context is forgotten from its beginning, half a context at a time: the model sees
    the latest tokens, at least half its context and at most all of it. (Forgetting one token at a time would move every
    learned position and cost a pass over the whole context for each token.)

    Args:
        model: Gives the logits.
        prompt_tokens: Ids to continue, [batch, time] with at least one token each.
        max_new_tokens: How many tokens to add at most.
        temperature: Divides the logits before sampling; 0 always takes the likeliest token.
        top_k: Sample among the ``top_k`` likeliest tokens only; None means all of them.
        generator: Source of the randomness; None is torch's global one. A CPU generator serves a model on any device.
        stop_token: A row that has drawn this id goes on with nothing else; when all rows have, the text ends.

    Returns:
        Prompt and continuation, [batch, time + max_new_tokens], or shorter where all rows came to the stop token.

    Raises:
        ValueError: The prompt is empty, not two-dimensional or holds ids that the model does not know, a setting is out
            of its range, or the model's predictions are not numbers.
    """
    steps = stream(
        model,
        prompt_tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=generator,
        stop_token=stop_token,
    )
    return torch.cat([prompt_tokens, *(ids.unsqueeze(1) for ids in steps)], dim=1)


def stream(
    model: GPT,
    prompt_tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """The continuation of :func:`generate` as it comes: ids [batch], one tensor a token. The same arguments and errors.

    The model is in evaluation mode while a token is computed, and as it was in between.
    """
    _check_prompt(model, prompt_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must not be negative")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest token) or positive")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all tokens")

    def steps() -> Iterator[Tensor]:
        tokens, reader = prompt_tokens, _Reader(model)
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            ids = _draw(reader.next_logits(tokens), temperature, top_k, generator)
            if stop_token is not None:
                ids = ids.masked_fill(stopped, stop_token)
                stopped |= ids == stop_token
            yield ids
            if stop_token is not None and bool(stopped.all()):
                return
            tokens = torch.cat([tokens, ids.unsqueeze(1)], dim=1)

    return steps()


def window_start(length: int, context: int) -> int:
    """The first of ``length`` tokens that the model still sees when it predicts the next: see :func:`generate`."""
    stride = max(1, context // 2)
    return 0 if length <= context else -(-(length - context) // stride) * stride


class _Reader:
    """A model with what it remembers of a growing text."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.start = 0
        self.cache = KeyValueCache()

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """Score what follows, where ``tokens`` [batch, time] begins with those of the last call -> [batch, vocab]."""
        start = window_start(tokens.shape[1], self.model.config.context)
        if start != self.start:
            self.start, self.cache = start, KeyValueCache()
        was_training = self.model.training
        self.model.eval()
        try:
            hidden = self.model.hidden(tokens[:, start + self.cache.length :], self.cache)
            logits: Tensor = self.model.head(hidden[:, -1]).float()
        finally:
            self.model.train(was_training)
        return logits


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Choose one id a row: logits [batch, vocab] -> ids [batch]."""
    if bool(logits.isnan().any()):
        raise ValueError(
            "the model's predictions are not numbers: its weights have diverged; take an earlier checkpoint"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = logits.device
    if generator is not None:
        logits = logits.to(generator.device)
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)
    # The largest is made 0 first: then no temperature, however small, overflows.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    choice = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1).to(device)


def _check_prompt(model: GPT, prompt_tokens: Tensor) -> None:
    if prompt_tokens.ndim != 2 or 0 in prompt_tokens.shape:
        shape = list(prompt_tokens.shape)
        raise ValueError(f"prompt_tokens has shape {shape}; give [batch, time] with one token or more")
    least, most = int(prompt_tokens.min()), int(prompt_tokens.max())
    if least < 0 or most >= model.config.vocab_size:
        wrong = least if least < 0 else most
        raise ValueError(f"prompt_tokens holds id {wrong}; the model knows ids 0 to {model.config.vocab_size - 1}")
