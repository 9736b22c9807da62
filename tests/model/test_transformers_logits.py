"""Our logits and those of transformers' GPT2LMHeadModel with the same weights, by a mapping of this test's own."""

import pytest
import torch

from sophia.model import GPT, GPTConfig

SIZES = {"vocab_size": 50, "context": 16, "layers": 3, "heads": 2, "width": 8}


def theirs(activation, by_layer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_layer=3,
        n_head=2,
        n_embd=8,
        activation_function=activation,
        scale_attn_by_inverse_layer_idx=by_layer,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)  # biases and norms too, so that a mix-up shows
    return model


def ours(model, *, padded, **settings):
    """Copy weight by weight; transformers stores linear layers transposed."""
    gpt = GPT(GPTConfig(**SIZES, bias=True, padded_vocab_size=padded, **settings)).eval()
    source = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    pairs = {"positions": "wpe", "final_norm": "ln_f"}
    for layer in range(3):
        pairs |= {
            f"blocks.{layer}.{mine}": f"h.{layer}.{other}"
            for mine, other in {
                "attention_norm": "ln_1",
                "attention.queries_keys_values": "attn.c_attn",
                "attention.output": "attn.c_proj",
                "feed_forward_norm": "ln_2",
                "feed_forward.expand": "mlp.c_fc",
                "feed_forward.output": "mlp.c_proj",
            }.items()
        }
    with torch.no_grad():
        gpt.tokens.weight[:50] = source["wte.weight"]
        for mine, other in pairs.items():
            for name, parameter in gpt.get_submodule(mine).named_parameters():
                value = source[f"{other}.{name}"]
                parameter.copy_(value.T if ".c_" in other and value.ndim == 2 else value)
    return gpt


@pytest.mark.parametrize(
    ("theirs_activation", "activation", "by_layer", "padded"),
    [
        ("gelu_new", "gelu_tanh", False, None),  # OpenAI's
        ("gelu_new", "gelu_tanh", True, 64),
        ("gelu", "gelu", False, 64),
    ],
)
def test_logits_equal_those_of_transformers(theirs_activation, activation, by_layer, padded):
    reference = theirs(theirs_activation, by_layer)
    model = ours(reference, padded=padded, activation=activation, attention_scale_by_layer=by_layer)
    tokens = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        expected, got = reference(tokens).logits, model(tokens)[..., :50]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5  # not equal because all are alike


def test_the_two_kinds_of_gelu_are_told_apart():
    reference = theirs("gelu_new", False)
    tokens = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        exact = ours(reference, padded=None, activation="gelu")(tokens)
        assert (reference(tokens).logits - exact).abs().max() > 1e-4
