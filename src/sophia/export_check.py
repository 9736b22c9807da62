"""The proof that `transformers` makes of an exported folder what our model and tokenizer make of the same input."""

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sophia.hf_tokenizer import PROBES
from sophia.model import GPT

TOLERANCE = 3e-5
"""Largest difference of two logits that counts as equal, in units of the largest logit (at least 1).

Random weights with a standard deviation of 0.3 in 24 layers gave 6e-6; another form of GELU gives some 3e-4.
"""

_OURS = "this is a mistake of sophia's, please report it"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What loading an exported folder showed."""

    tokens: int
    """Random tokens in one sequence, at whose positions all logits were compared."""
    max_difference: float
    """Largest absolute difference of two logits."""
    tolerance: float
    """The difference that was allowed."""


def require_transformers() -> None:
    """Refuse to begin what could not be checked.

    Raises:
        ValueError: `transformers` is not installed.
    """
    if find_spec("transformers") is None:
        raise ValueError(
            "checking the exported folder needs transformers: pip install 'sophia-lm[hf]', or export with --no-check"
        )


def check_export(model: GPT, tokenizer: Tokenizer, folder: Path, *, seed: int = 0) -> Check:
    """Load a folder as users do and compare logits on random tokens, in fp32 on the CPU, and the tokens of some texts.

    Raises:
        ValueError: Tensors are missing or left over, or logits, ids or text differ.
    """
    theirs, their_tokenizer = _load(folder)
    _compare_tokenizers(tokenizer, their_tokenizer, folder)
    context = model.config.context
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(seed))
    expected = _logits_on_cpu(model, tokens)  # [1, context, vocab]
    with torch.no_grad():
        actual = theirs.eval()(tokens).logits
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
    difference = (expected - actual).abs().max().item()
    if not bool(expected.isfinite().all()):
        raise ValueError("the model gives logits that are not finite: export an earlier checkpoint")
    if not difference <= tolerance:  # so that NaN fails too
        raise ValueError(
            f"{folder}: logits of transformers differ by {difference:.2g}, and {tolerance:.2g} is allowed: {_OURS}"
        )
    return Check(tokens=context, max_difference=difference, tolerance=tolerance)


def _load(folder: Path) -> tuple[Any, Any]:
    with _quiet_transformers() as transformers:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    odd = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if odd:
        raise ValueError(f"{folder}: transformers did not load all tensors ({odd}): {_OURS}")
    return model, tokenizer


@torch.no_grad()
def _logits_on_cpu(model: GPT, tokens: Tensor) -> Tensor:
    """What the weights give in fp32 on the CPU, wherever and in whatever mode the model is."""
    weight = model.positions.weight
    if model.training or weight.device.type != "cpu" or weight.dtype != torch.float32:
        model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    logits: Tensor = model(tokens)
    return logits[..., : model.config.vocab_size]


def _compare_tokenizers(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    """Compare ids and text with those of the tokenizer as a user gets it."""
    for probe in PROBES:
        ids = ours.encode(probe, add_special_tokens=False).ids  # as training saw it
        if ids != theirs(probe, verbose=False)["input_ids"]:
            raise ValueError(f"{folder}: AutoTokenizer gives other ids for {probe!r}: {_OURS}")
        if ours.decode(ids, skip_special_tokens=False) != theirs.decode(ids):
            raise ValueError(f"{folder}: AutoTokenizer gives another text for {probe!r}: {_OURS}")


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """The module `transformers`, an extra, without its progress bars."""
    transformers: Any = importlib.import_module("transformers")
    logging = transformers.utils.logging
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if had_bars:
            logging.enable_progress_bar()
