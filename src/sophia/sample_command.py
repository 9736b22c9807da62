"""`sophia sample`: text from a trained model, printed as it comes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from sophia.data.tokens import END_OF_TEXT
from sophia.distributed import pick_device
from sophia.sample import stream
from sophia.trained import Trained, load_trained

_REPLACEMENT = "\ufffd"  # what a decoder makes of a character whose bytes have not all come
_VISIBLE_SPACE = "\n\t"


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings of `sophia sample`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder, or the folder of a GPT-2 as sophia export writes it."""
    prompt: str = ""
    """Text to continue; "<|endoftext|>" stands for the beginning of a text."""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue."""
    max_tokens: int = 200
    """Tokens to add at most; a text ends before that where the model ends it."""
    temperature: float = 0.8
    """Divides the logits: below 1 the likelier tokens get likelier still, 0 always takes the likeliest."""
    top_k: int | None = 50
    """Draw among so many of the likeliest tokens; None draws among all."""
    samples: int = 1
    """Continuations to write."""
    seed: int = 0
    """Sample i is a function of (seed, i), of the model and of the other settings."""
    checkpoint: int | Literal["latest"] = "latest"
    """Step of the checkpoint."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU."""
    json: bool = False
    """Print one JSON object at the end instead of the text as it comes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, before a model is loaded."""
        if self.prompt and self.prompt_file is not None:
            raise ValueError("there are two prompts: give either --prompt TEXT or --prompt-file FILE")
        for name in ("max_tokens", "samples", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or positive")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


def sample(settings: Annotated[SampleSettings, tyro.conf.arg(name="")]) -> None:
    """Continue a text with a trained model."""
    prompt = _prompt(settings)
    trained = load_trained(settings.run, settings.checkpoint, pick_device(settings.device))
    ids = trained.tokenizer.encode(prompt, add_special_tokens=False).ids  # as training saw it
    if not ids:
        raise ValueError(f"the prompt {prompt!r} gives no tokens: give another")
    written = []
    for index in range(settings.samples):
        if not settings.json and settings.samples > 1:
            print(f"--- {index + 1} of {settings.samples} ---")
        if not settings.json:
            _show(prompt)
        one = _Continuation(trained)
        for piece in one.pieces(ids, settings, index):
            if not settings.json:
                _show(piece)
        if not settings.json:
            print()
        written.append({"text": one.text, "tokens": one.ids, "ended": one.ended})
    if settings.json:
        print(json.dumps({"run": str(settings.run), "step": trained.step, "prompt": prompt, "samples": written}))


class _Continuation:
    """One sample as it grows."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        """Whether the model has ended the text, with a token that is in neither ids nor text."""

    def pieces(self, prompt: list[int], settings: SampleSettings, index: int) -> Iterator[str]:
        """Draw tokens; yields text as soon as its characters are complete."""
        steps = stream(
            self.trained.model,
            torch.tensor([prompt], device=self.trained.model.positions.weight.device),
            settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            generator=_generator(settings.seed, index),
        )
        for step in steps:
            token = int(step)
            if token == self.trained.end_of_text:
                self.ended = True
                break
            self.ids.append(token)
            text = self._decoded()
            if not text.endswith(_REPLACEMENT):
                yield text[len(self.text) :]
                self.text = text
        rest = self._decoded()[len(self.text) :]
        self.text += rest
        if rest:
            yield rest

    def _decoded(self) -> str:
        return str(self.trained.tokenizer.decode(self.ids, skip_special_tokens=False))


def _prompt(settings: SampleSettings) -> str:
    prompt = settings.prompt
    if settings.prompt_file is not None:
        try:
            prompt = settings.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            raise ValueError(f"{settings.prompt_file} is not UTF-8 text ({problem}): save it as UTF-8") from None
    if not prompt:
        raise ValueError(
            f"the prompt is empty: give --prompt TEXT or --prompt-file FILE; {END_OF_TEXT!r} begins a text"
        )
    return prompt


def _generator(seed: int, index: int) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)  # torch's seeds have 63 bits and a sign


def _show(text: str) -> None:
    if sys.stdout.isatty():  # no model may steer a terminal
        text = "".join(c if c.isprintable() or c in _VISIBLE_SPACE else _REPLACEMENT for c in text)
    print(text, end="", flush=True)
