"""The GPT-2 of the system."""

import math

import pytest
import torch

from sophia.model import GPT, GPTConfig
from sophia.sample import generate

SMALL = {"vocab_size": 50, "context": 16, "layers": 3, "heads": 2, "width": 8}


def small(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings}))


def test_logits_have_one_row_a_token():
    assert small()(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7, 50)


def test_positions_see_only_what_came_before():
    model, tokens = small().eval(), torch.randint(0, 50, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_parameter_count_of_gpt2_small():
    """The published 124 M with biases and a vocabulary of 50257; the paper's without biases."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, context=1024, layers=12, heads=12, width=768, bias=True))
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == 124_439_808
    assert len(parameters) == 148


def test_head_and_embedding_are_one_matrix():
    model = small()
    assert [p.shape for p in model.parameters()].count(torch.Size([50, 8])) == 1


def test_initial_loss_is_that_of_guessing():
    model, tokens = small(), torch.randint(0, 50, (8, 16))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(50), rel=0.03)


def test_matrices_into_the_residual_stream_start_smaller():
    model = GPT(GPTConfig(vocab_size=50, context=16, layers=8, heads=2, width=64))
    deviations = sorted(p.std().item() for p in model.parameters() if p.ndim == 2)
    assert deviations[0] == pytest.approx(0.02 / math.sqrt(16), rel=0.1)
    assert deviations[-1] == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "width 8 is not divisible by heads 3"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **settings})


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="16"):
        small()(torch.zeros(1, 17, dtype=torch.long))


def test_sampling_is_a_function_of_its_generator():
    model, prompt = small(), torch.tensor([[1, 2, 3]])

    def draw(seed, **settings):
        return generate(model, prompt, 20, generator=torch.Generator().manual_seed(seed), **settings)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, temperature=0), draw(2, top_k=1))  # both take the likeliest token
    assert draw(1).shape == (1, 23)
    assert model.training


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"max_new_tokens": -1}])
def test_sampling_refuses_impossible_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        generate(small(), torch.tensor([[1]]), **{"max_new_tokens": 1, **settings})
