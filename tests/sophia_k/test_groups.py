"""`SophiaK.groups` tells the matrices of hidden layers from those that only look like them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaK
from sophia.model import GPT, GPTConfig

VOCABULARY, WIDTH = 11, 6


class Model(nn.Module):
    """An embedding, positions, a block with a fused weight, a norm and a head."""

    def __init__(self, tied, vocabulary=VOCABULARY, rows=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(5, WIDTH)
        self.block = nn.ModuleDict({"up": nn.Linear(WIDTH, 2 * WIDTH), "down": nn.Linear(2 * WIDTH, WIDTH)})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, rows or vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(x + self.block["down"](torch.tanh(self.block["up"](x)))))


BLOCK = {"block.up.weight", "block.down.weight"}


def hidden(model, groups):
    """Names of what is hidden; every parameter is in one group."""
    names = {p: name for name, p in model.named_parameters()}
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(names)
    assert set(members) == set(names)
    return {names[p] for group in groups if group["hidden"] for p in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_not_hidden(tied):
    model = Model(tied)
    assert hidden(model, SophiaK.groups(model)) == BLOCK


def test_the_head_is_the_last_with_the_vocabularys_rows():
    """Also where the block has as many."""
    model = Model(tied=False, vocabulary=2 * WIDTH)
    assert hidden(model, SophiaK.groups(model)) == BLOCK


def test_without_embeddings_the_last_linear_layer_is_the_head():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    groups = SophiaK.groups(model)
    assert hidden(model, groups) == {"1.weight", "2.weight"}
    assert [len(group["params"]) for group in groups] == [2, 2, 4]  # the convolution, and the head; biases


def test_a_head_that_is_no_linear_layer_of_the_vocabulary():
    """A classifier, or one whose rows are padded: guessing could take a hidden layer for it."""
    model = Model(tied=False, rows=3)
    with pytest.raises(ValueError, match=r"found no output head.*head=model\.lm_head.*head=None"):
        SophiaK.groups(model)
    assert hidden(model, SophiaK.groups(model, head=model.head)) == BLOCK
    assert hidden(model, SophiaK.groups(model, head=None)) == BLOCK | {"head.weight"}


def test_our_own_model():
    model = GPT(GPTConfig(vocab_size=20, context=4, layers=2, heads=2, width=8), torch.Generator().manual_seed(0))
    expected = {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    assert len(expected) == 8
    assert hidden(model, SophiaK.groups(model)) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers(kind):
    """GPT-2's head is tied, Llama's is not; GPT-2's matrices are no `nn.Linear`."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=16)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(**shape, intermediate_size=16, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    layers = {name for name, p in model.named_parameters() if p.ndim == 2 and (".h." in name or ".layers." in name)}
    assert len(layers) >= 4
    assert hidden(model, SophiaK.groups(model)) == layers


def test_patterns_take_matrices_out():
    model = Model(tied=True)
    assert hidden(model, SophiaK.groups(model, exclude=["block.up.*"])) == {"block.down.weight"}
    assert hidden(model, SophiaK.groups(model, exclude=["*.up.*", "tokens.*"])) == {"block.down.weight"}
    with pytest.raises(ValueError, match=r"'blocks\.\*' matches no parameter: .* tokens\.weight, positions\.weight"):
        SophiaK.groups(model, exclude=["block.up.*", "blocks.*"])
    with pytest.raises(ValueError, match=r"exclude='block\.up\.weight' is one text: give a list"):
        SophiaK.groups(model, exclude="block.up.weight")


def test_a_model_without_hidden_matrices_has_a_group_less():
    """It is AdamW's then, and wants no curvature."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    groups = SophiaK.groups(model)
    assert [group["hidden"] for group in groups] == [False, False]
    assert not SophiaK(groups).curvature_due


@pytest.mark.parametrize("head", ["lm_head", nn.Linear(2, 2), nn.Tanh()], ids=["name", "foreign", "none"])
def test_a_head_that_is_none(head):
    with pytest.raises(ValueError, match="head="):
        SophiaK.groups(Model(tied=False), head=head)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_names_are_those_inside_a_wrapper(name):
    """Of DDP and of torch.compile."""
    model, wrapper = Model(tied=True), nn.Module()
    wrapper.add_module(name, model)
    groups = SophiaK.groups(wrapper, exclude=["block.up.*"])
    assert hidden(model, groups) == {"block.down.weight"}


def test_groups_train():
    """Vectors do not decay; the others have betas of their own; more may be said; it is the hand-made optimizer."""
    model = Model(tied=True).double()
    twin = copy.deepcopy(model)
    groups = SophiaK.groups(model)
    assert [(group.get("betas"), group.get("weight_decay")) for group in groups] == [
        (None, None),
        ((0.9, 0.98), None),
        ((0.9, 0.98), 0.0),
    ]
    groups[0]["orthogonalize"] = 0
    by_hand = dict(twin.named_parameters())
    rest = {"hidden": False, "betas": (0.9, 0.98)}
    other = SophiaK(
        [
            {"params": [by_hand[name] for name in ("block.up.weight", "block.down.weight")], "orthogonalize": 0},
            {"params": [by_hand[name] for name in ("tokens.weight", "positions.weight")], **rest},
            {"params": [p for p in twin.parameters() if p.ndim == 1], **rest, "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    source = torch.Generator().manual_seed(0)
    pairs = [(model, SophiaK(groups, lr=0.01).attach(model)), (twin, other.attach(twin))]
    for _ in range(3):
        tokens = torch.randint(0, VOCABULARY, (8, 5), generator=source)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    assert pairs[0][1].refreshes == 1
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("tied", [True, False])
def test_attach_refuses_an_embedding_among_the_hidden_matrices(tied):
    model = Model(tied)
    optimizer = SophiaK(model.parameters())
    message = r"tokens\.weight of shape \(11, 6\), positions\.weight .*SophiaK\.groups\(model\).*\"hidden\": False"
    with pytest.raises(ValueError, match=message):
        optimizer.attach(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    SophiaK(model.parameters(), hidden=False).attach(model)
