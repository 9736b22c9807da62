"""Generation with a key-value cache equals generation without one."""

import pytest
import torch

from sophia.cache import KeyValueCache
from sophia.model import GPT, GPTConfig
from sophia.sample import generate, stream, window_start

IDS, CONTEXT = 50, 12


def model_of(**settings):
    torch.manual_seed(0)
    shape = {"vocab_size": IDS, "context": CONTEXT, "layers": 2, "heads": 2, "width": 16, **settings}
    model = GPT(GPTConfig(**shape))
    for p in model.parameters():
        p.data.mul_(8)  # predictions far from uniform
    return model


@torch.no_grad()
def uncached(model, tokens, count, *, temperature=1.0, top_k=None, seed=0):
    """The same law without a cache: the whole window through the model for every token."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for _ in range(count):
        length, start = tokens.shape[1], 0
        while length - start > CONTEXT:
            start += CONTEXT // 2
        logits = model(tokens[:, start:])[:, -1].double()
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        elif top_k is None:
            chosen = torch.multinomial((logits / temperature).softmax(-1).float(), 1, generator=generator)
        else:
            values, ids = logits.topk(top_k)
            chosen = ids.gather(
                1, torch.multinomial((values / temperature).softmax(-1).float(), 1, generator=generator)
            )
        tokens = torch.cat([tokens, chosen], 1)
    return tokens


@pytest.mark.parametrize("prompt", [1, 5, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}])
def test_the_cache_changes_no_token(prompt, settings):
    """Also when the text grows beyond the context, and when the prompt is longer."""
    model = model_of()
    tokens = torch.randint(0, IDS, (3, prompt))
    expected = uncached(model, tokens, 40, **settings)
    got = generate(model, tokens, 40, generator=torch.Generator().manual_seed(0), **settings)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("split", [1, 4, 9])
def test_a_cache_read_in_parts_gives_the_same_hidden_states(split):
    model, tokens, cache = model_of().eval(), torch.randint(0, IDS, (2, 10)), KeyValueCache()
    parts = [model.hidden(tokens[:, :split], cache), model.hidden(tokens[:, split:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(tokens), rtol=1e-4, atol=1e-5)
    assert cache.length == 10


def test_each_token_runs_one_position():
    model, seen = model_of(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    generate(model, torch.zeros(1, 4, dtype=torch.long), 6)
    assert seen == [4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("context", [1, 2, 7, 12])
def test_the_window_keeps_at_least_half_the_context(context):
    for length in range(1, 5 * context):
        seen = length - window_start(length, context)
        assert min(length, -(-context // 2)) <= seen <= context


def test_padding_is_never_drawn():
    model = model_of(padded_vocab_size=64)
    text = generate(model, torch.zeros(4, 1, dtype=torch.long), 60, temperature=50.0, top_k=60)
    assert text.max() < IDS


def test_a_stop_token_ends_the_text_when_all_rows_have_it():
    model, tokens = model_of(), torch.randint(0, IDS, (3, 2))
    free = generate(model, tokens, 30, generator=torch.Generator().manual_seed(1))[:, 2:]
    stop = int(free[0, 3])
    text = generate(model, tokens, 30, generator=torch.Generator().manual_seed(1), stop_token=stop)[:, 2:]
    for row, expected in zip(text.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row[:end] == expected[: min(end, len(row))]
        assert set(row[end:]) <= {stop}
    first = generate(model, tokens[:1], 30, generator=torch.Generator().manual_seed(1), stop_token=stop)
    assert first[0, -1] == stop
    assert (first[0, 2:-1] != stop).all()


def test_a_stream_gives_the_same_tokens_as_they_come():
    model, tokens = model_of(), torch.randint(0, IDS, (2, 3))
    pieces = list(stream(model, tokens, 7, generator=torch.Generator().manual_seed(2)))
    assert [piece.shape for piece in pieces] == [(2,)] * 7
    whole = generate(model, tokens, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.stack(pieces, 1), whole[:, 3:])


def test_no_tokens_asked_for():
    prompt = torch.tensor([[1, 2]])
    assert torch.equal(generate(model_of(), prompt, 0), prompt)


def test_a_tiny_temperature_is_the_likeliest_token():
    model, tokens = model_of(), torch.randint(0, IDS, (2, 3))
    assert torch.equal(generate(model, tokens, 8, temperature=1e-30), generate(model, tokens, 8, temperature=0))


def test_dropout_is_off_while_generating_and_on_again_after():
    model = model_of(dropout=0.5)
    texts = [generate(model, torch.tensor([[1]]), 10, temperature=0) for _ in range(2)]
    assert torch.equal(*texts)
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[1, IDS]], f"id {IDS}; the model knows ids 0 to {IDS - 1}"),
        ([[-1]], "id -1"),
        ([1, 2], r"shape \[2\]"),
        ([[]], r"shape \[1, 0\]"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model_of(), torch.tensor(prompt, dtype=torch.long), 3)


def test_a_diverged_model_is_named():
    model = model_of()
    model.final_norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="weights have diverged"):
        generate(model, torch.tensor([[1]]), 1)


def test_a_cache_of_another_batch_is_refused():
    model, cache = model_of().eval(), KeyValueCache()
    model.hidden(torch.zeros(2, 3, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="batch of 2, not 1"):
        model.hidden(torch.zeros(1, 1, dtype=torch.long), cache)


def test_a_full_cache_is_refused():
    model, cache = model_of().eval(), KeyValueCache()
    model.hidden(torch.zeros(1, CONTEXT, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens does not fit the context of {CONTEXT}"):
        model.hidden(torch.zeros(1, 1, dtype=torch.long), cache)
