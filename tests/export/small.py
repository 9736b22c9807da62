"""Small models and tokenizers for the tests of this folder."""

import torch
from tokenizers import Tokenizer

from sophia.data.builtin import Document
from sophia.data.tokenizer import byte_tokenizer
from sophia.data.tokens import train_tokenizer
from sophia.model import GPT, GPTConfig

SHAPE = {"vocab_size": 300, "context": 24, "layers": 3, "heads": 2, "width": 16}
TEXT = "Thirty spoons of grüner Tee, and thirty more; then the cups: 3 + 30 = 33.\n\tif tea: drink(tea)  # now\n" * 20


def bpe() -> Tokenizer:
    return train_tokenizer([Document("text", TEXT)], 300)


def small_model(**settings) -> GPT:
    """All weights random, norms and biases too, and large enough that a mistake in any of them is seen."""
    model = GPT(GPTConfig(**{**SHAPE, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model.eval()


TOKENIZERS = {"bytes": byte_tokenizer, "bpe": bpe}
