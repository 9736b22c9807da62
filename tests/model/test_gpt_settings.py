"""The settings of the model, against a GPT-2 written out in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sophia.model import GPT, GPTConfig
from tests.model.plain import plain_logits

SMALL = {"vocab_size": 50, "context": 16, "layers": 3, "heads": 2, "width": 8}


def lively(**settings):
    """A model whose every parameter matters: larger weights, norms and biases away from 1 and 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_those_written_out(bias, by_layer, activation):
    model = lively(bias=bias, attention_scale_by_layer=by_layer, activation=activation)
    tokens = torch.randint(0, 50, (2, 11))
    torch.testing.assert_close(model(tokens).double(), plain_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_settings_make_a_difference():
    tokens = torch.randint(0, 50, (2, 11))
    usual = lively()(tokens)
    assert not torch.allclose(lively(attention_scale_by_layer=True)(tokens), usual, atol=1e-3)
    assert not torch.equal(lively(activation="gelu_tanh")(tokens), usual)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(dropout):
    """With dropout the masks of the first forward pass must come again in the second."""
    tokens = torch.randint(0, 50, (2, 11))
    gradients = []
    for checkpointing in (False, True):
        model = lively(dropout=dropout, activation_checkpointing=checkpointing)
        torch.manual_seed(1)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


def test_activation_checkpointing_keeps_only_the_input_of_each_block():
    saved = {}
    for checkpointing in (False, True):
        model, shapes = lively(activation_checkpointing=checkpointing), []

        def pack(tensor, shapes=shapes):
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(2, 11, dtype=torch.long))
        saved[checkpointing] = shapes.count((2, 11, 32))  # what GELU and the layer behind it read
    assert saved[True] == 0 < saved[False]


def test_checkpointing_without_gradients_computes_once():
    model, calls = lively(activation_checkpointing=True), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(calls) == 1


def test_evaluation_has_no_dropout():
    model, tokens = lively(dropout=0.5).eval(), torch.randint(0, 50, (1, 9))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_compiled_as_one_graph():
    model = lively(layers=1, padded_vocab_size=64, activation_checkpointing=True)
    tokens = torch.randint(0, 50, (2, 11))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_initial_weights_are_a_function_of_the_generator():
    config = GPTConfig(**SMALL)
    one = GPT(config, torch.Generator().manual_seed(3))
    torch.manual_seed(99)  # the global generator has no part in it
    other = GPT(config, torch.Generator().manual_seed(3))
    third = GPT(config, torch.Generator().manual_seed(4))
    pairs = list(zip(one.parameters(), other.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("padded", [None, 64])
def test_a_model_from_the_meta_device_has_the_same_weights(padded):
    config = GPTConfig(**SMALL, bias=True, padded_vocab_size=padded)
    here = GPT(config, torch.Generator().manual_seed(3))
    with torch.device("meta"):
        empty = GPT(config)
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.initialize(torch.Generator().manual_seed(3))
    assert filled.head.weight is filled.tokens.weight
    for (name, a), (_, b) in zip(here.state_dict().items(), filled.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.randint(0, 50, (1, 5))
    assert torch.equal(here(tokens), filled(tokens))


def test_shards_get_the_weights_of_the_whole():
    """FSDP2: parameters are drawn whole and each rank takes its part."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        config = GPTConfig(**SMALL, padded_vocab_size=64)
        sharded = copy.deepcopy(lively(padded_vocab_size=64))
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        sharded.initialize(torch.Generator().manual_seed(3))
        whole = GPT(config, torch.Generator().manual_seed(3))
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a.full_tensor(), b)
    finally:
        destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padded_vocab_size": 49}, "padded_vocab_size is 49, fewer than the 50 ids.*choose for example 128"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_settings_that_no_model_can_have(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL, **settings)
