"""Text from the machine itself, and batches of its tokens."""

import numpy as np
import pytest
import torch

from sophia.data.builtin import builtin_documents, fingerprint
from sophia.data.tokens import END_OF_TEXT, batch, encode, split_documents, train_tokenizer, validation_batches


@pytest.fixture(scope="module")
def documents():
    return builtin_documents(700_000)


def test_builtin_text_is_the_same_every_time(documents):
    again = builtin_documents(700_000)
    assert again == documents
    assert fingerprint(again) == fingerprint(documents)
    assert fingerprint(documents[1:]) != fingerprint(documents)
    assert 300_000 < sum(len(document.text.encode()) for document in documents) <= 700_000
    assert len({document.name for document in documents}) == len(documents)
    assert not any("site-packages" in document.name for document in documents)


def test_a_smaller_budget_gives_the_first_documents(documents):
    fewer = builtin_documents(300_000)
    assert documents[: len(fewer)] == fewer


def test_a_budget_too_small_is_refused():
    with pytest.raises(ValueError, match="max_bytes 1 holds no document"):
        builtin_documents(1)


def test_splits_do_not_share_documents(documents):
    train, validation = split_documents(documents, 0.2)
    assert sorted([*train, *validation]) == sorted(documents)
    more = split_documents(documents[:-1], 0.2)
    assert set(more[1]) <= set(validation)  # no document changes sides


def test_any_text_comes_back_exact(documents):
    tokenizer = train_tokenizer(documents, 400)
    text = 'for x in "naïve 木 \t\n  text":'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    ids = encode(tokenizer, documents)
    assert ids.dtype == np.uint16
    assert (ids == tokenizer.token_to_id(END_OF_TEXT)).sum() == len(documents)
    assert ids.max() < 400


@pytest.mark.parametrize("size", [256, 70_000])
def test_impossible_vocabularies_are_refused(documents, size):
    with pytest.raises(ValueError, match=f"vocab_size is {size}"):
        train_tokenizer(documents, size)


def test_batches_are_a_function_of_seed_and_step():
    tokens = np.arange(5000, dtype=np.uint16)
    inputs, targets = batch(tokens, seed=1, step=7, batch_size=4, context=16)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(targets, inputs + 1)
    again, _ = batch(tokens, seed=1, step=7, batch_size=4, context=16)
    assert torch.equal(inputs, again)
    for other in ({"seed": 2, "step": 7}, {"seed": 1, "step": 8}):
        assert not torch.equal(inputs, batch(tokens, **other, batch_size=4, context=16)[0])


def test_batches_reach_the_whole_text():
    tokens = np.arange(40, dtype=np.uint16)
    seen = {
        int(x) for step in range(200) for x in batch(tokens, seed=0, step=step, batch_size=4, context=8)[1].flatten()
    }
    assert seen == set(range(1, 40))


def test_validation_windows_are_spread_over_the_text():
    tokens = np.arange(2000, dtype=np.uint16)
    batches = validation_batches(tokens, windows=10, batch_size=4, context=16)
    assert [inputs.shape for inputs, _ in batches] == [(4, 16)] * 3
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert starts[0] == 0
    assert starts[-1] == 2000 - 16 - 1


@pytest.mark.parametrize("make", [batch, validation_batches])
def test_too_little_text_is_refused(make):
    arguments = {"seed": 0, "step": 0} if make is batch else {"windows": 4}
    with pytest.raises(ValueError, match="10"):
        make(np.arange(10, dtype=np.uint16), batch_size=4, context=16, **arguments)
