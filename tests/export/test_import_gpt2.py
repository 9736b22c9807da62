"""`import_gpt2`: the model that transformers computes, from every form of its folder, and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sophia.export import export_model
from sophia.import_hf import import_gpt2
from sophia.model import GPT
from sophia.snapshot import load_weights
from tests.export.small import bpe, small_model


def write_gpt2(folder, **settings):
    """A GPT-2 of transformers with random weights everywhere, saved."""
    shape = {"vocab_size": 70, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    config = transformers.GPT2Config(**{**shape, "bos_token_id": 0, "eos_token_id": 0, **settings})
    theirs = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if ".ln_" in name and name.endswith("weight") else noise)
    theirs.save_pretrained(folder)
    return theirs


def ours(folder, **settings):
    config, weights = import_gpt2(folder, **settings)
    model = GPT(config).eval()
    load_weights(model, weights)
    return model


def assert_same(theirs, model):
    tokens = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        actual, expected = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(actual[..., :70], expected, rtol=1e-4, atol=1e-4)
    assert (actual[..., 70:] == -torch.inf).all()


@pytest.fixture
def folder(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh", "scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ],
)
def test_logits_are_equal(settings, tmp_path):
    theirs = write_gpt2(tmp_path, **settings)
    model = ours(tmp_path, padded_vocab_size=128)
    assert_same(theirs, model)
    assert model.config.dropout == theirs.config.resid_pdrop
    assert model.config.bias
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_shards(tmp_path):
    theirs = write_gpt2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(theirs, ours(tmp_path))


@pytest.mark.parametrize("form", ["bare names", "masks", "half precision", "head written out", "pickled"])
def test_other_forms_of_the_weights(form, tmp_path):
    theirs = write_gpt2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if form == "bare names":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if form == "masks":
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if form == "half precision":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        theirs = theirs.bfloat16().float()
    if form == "head written out":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    if form == "pickled":
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    assert_same(theirs, ours(tmp_path))
    assert {tensor.dtype for tensor in import_gpt2(tmp_path)[1].values()} == {torch.float32}


@pytest.mark.parametrize("settings", [{}, {"bias": True, "activation": "gelu_tanh", "attention_scale_by_layer": True}])
def test_an_exported_model_comes_back_exactly(settings, tmp_path):
    model = small_model(**settings, padded_vocab_size=320)
    export_model(model, bpe(), tmp_path / "out", end_of_text=0, check=False)
    config, weights = import_gpt2(tmp_path / "out", padded_vocab_size=320)
    assert config == model.config
    again = GPT(config)
    load_weights(again, weights)
    tokens = torch.arange(24)[None]
    assert torch.equal(again.eval()(tokens), model(tokens))


def test_biases_can_be_asked_for(tmp_path, folder):
    export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0, check=False)
    config, weights = import_gpt2(tmp_path / "out", bias=True)
    assert config.bias
    assert not weights["blocks.0.attention.output.bias"].any()
    with pytest.raises(ValueError, match="has biases"):
        import_gpt2(folder, bias=False)


def test_dropout_can_be_chosen(folder):
    assert import_gpt2(folder)[0].dropout == 0.1
    assert import_gpt2(folder, dropout=0.0)[0].dropout == 0.0
    change_config(folder, attn_pdrop=0.2)
    assert import_gpt2(folder, dropout=0.3)[0].dropout == 0.3
    with pytest.raises(ValueError, match=r"attn_pdrop 0.2: our model has one rate of dropout; say which"):
        import_gpt2(folder)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama': only GPT-2 folders"),
        ({"scale_attn_weights": False}, "scale_attn_weights False: only GPT-2s with True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True"),
        ({"add_cross_attention": True}, "add_cross_attention True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06: only GPT-2s with 1e-05"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_inner": 32}, r"n_inner 32: only GPT-2s with 64 \(4 n_embd\)"),
        ({"activation_function": "relu"}, "activation_function 'relu': only GPT-2s with gelu, gelu_new, gelu_pytorch"),
        ({"n_layer": None}, "n_layer None: it must be a whole number"),
        ({"n_layer": 2}, "has a tensor transformer.h.2"),
        ({"n_layer": 4}, r"lacks the tensor transformer.h.3.ln_1.weight and 11 more"),
        ({"n_head": 5}, "width 16 is not divisible by heads 5"),
        ({"vocab_size": 71}, r"wte.weight has the shape \[70, 16\], but its config.json means \[71, 16\]"),
        ({"n_positions": 32}, r"wpe.weight has the shape \[16, 16\], but its config.json means \[32, 16\]"),
    ],
)
def test_what_our_model_cannot_compute_is_refused(changes, message, folder):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        import_gpt2(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_head_of_its_own_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight apart from wte.weight"):
        import_gpt2(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"),
            "lacks the tensor transformer.h.1.mlp.c_fc.bias:",
        ),
        (lambda tensors: tensors.update(score=torch.ones(2)), "has a tensor score, which"),
        (
            lambda tensors: tensors["transformer.wpe.weight"][0].fill_(torch.nan),
            "wpe.weight has values that are not finite",
        ),
        (lambda tensors: tensors.update({"transformer.ln_f.bias": torch.ones(16, dtype=torch.int8)}), "torch.int8"),
    ],
)
def test_wrong_tensors_are_refused(change, message, folder):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        import_gpt2(folder)
    assert "\n" not in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def unpicklable(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": print}, folder / "pytorch_model.bin")


def lost_shard(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "a.safetensors", "transformer.wpe.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside_shard(folder):
    (folder / "model.safetensors").rename(folder.parent / "a.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor pytorch_model.bin"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json, so it is not a Hugging Face model"),
        (lambda folder: cut(folder / "config.json"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "model_type None"),
        (unpicklable, "pytorch_model.bin is damaged, or holds more than tensors"),
        (lost_shard, "names b.safetensors, which is not in its folder"),
        (outside_shard, "which is not in its folder"),
        (bad_index, "is not an index of weight files"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(damage, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        import_gpt2(folder)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: give one with"):
        import_gpt2(tmp_path / "nowhere")
