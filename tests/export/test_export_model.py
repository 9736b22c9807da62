"""`export_model`: what transformers makes of the folder, and that a folder is there whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import processors

from sophia import export, export_check
from sophia.export import export_model
from sophia.hf_tokenizer import write_tokenizer as write
from tests.export.small import SHAPE, TOKENIZERS, bpe, small_model

MODELS = {
    "paper": {},
    "padded": {"padded_vocab_size": 384},
    "original": {"bias": True, "activation": "gelu_tanh"},
    "scaled": {"attention_scale_by_layer": True},
    "dropout": {"dropout": 0.1, "activation_checkpointing": True},
}


def load(folder):
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "out"
    export_model(small_model(), bpe(), folder, end_of_text=0, check=False)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal(name, tmp_path):
    model = small_model(**MODELS[name])
    check = export_model(model, bpe(), tmp_path / "out", end_of_text=0)
    assert check.tokens == SHAPE["context"]
    assert check.max_difference <= check.tolerance
    theirs, _ = load(tmp_path / "out")
    tokens = torch.randint(SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        actual, expected = theirs(tokens).logits, model(tokens)[..., : SHAPE["vocab_size"]]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert theirs.config.resid_pdrop == theirs.config.attn_pdrop == theirs.config.embd_pdrop == model.config.dropout


def test_a_model_in_training_and_in_bf16_is_checked_as_its_fp32_weights(tmp_path):
    model = small_model(dropout=0.5).train().bfloat16()
    check = export_model(model, bpe(), tmp_path / "out", end_of_text=0)
    assert check.max_difference <= check.tolerance
    assert model.training
    assert model.positions.weight.dtype == torch.bfloat16
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.wpe.weight"].dtype == torch.float32


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_becomes_the_same_tokens_and_back(name, split, tmp_path):
    tokenizer = TOKENIZERS[name]()
    tokenizer.encode_special_tokens = split
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    export_model(small_model(), tokenizer, tmp_path / "out", end_of_text=end_of_text, check=False)
    _, theirs = load(tmp_path / "out")
    text = "Grüße\r\n  to <|endoftext|>\tall 🙂 of you ,  it's 中文 \x00\n\n"
    ids = tokenizer.encode(text).ids
    assert (end_of_text in ids) is not split
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (end_of_text, end_of_text, 24)


def test_nothing_is_put_around_a_text_that_training_did_not_see(tmp_path):
    tokenizer = bpe()
    around = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.post_processor = around
    assert tokenizer.encode("tea").ids[0] == 0
    export_model(small_model(), tokenizer, tmp_path / "out", end_of_text=0)
    _, theirs = load(tmp_path / "out")
    assert (
        theirs("tea")["input_ids"] == tokenizer.encode("tea", add_special_tokens=False).ids == bpe().encode("tea").ids
    )
    assert tokenizer.encode("tea").ids[0] == 0


def test_what_the_tokenizer_returns_goes_straight_into_the_model(exported):
    """An entry token_type_ids would be embedded by GPT-2 and change every logit."""
    theirs, tokenizer = load(exported)
    inputs = tokenizer("thirty spoons", return_tensors="pt")
    with torch.no_grad():
        expected = small_model()(inputs["input_ids"])
        torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_generation_stops_at_the_end_of_text(tmp_path):
    model, prompt = small_model(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        likeliest = model(prompt)[0, -1].argmax().item()
    export_model(model, bpe(), tmp_path / "out", end_of_text=likeliest, check=False)
    theirs, _ = load(tmp_path / "out")
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert written.tolist() == [[5, 6, 7, likeliest]]


def test_without_an_end_of_text_there_is_none(tmp_path):
    export_model(small_model(), bpe(), tmp_path / "out", end_of_text=None)
    theirs, tokenizer = load(tmp_path / "out")
    assert theirs.config.eos_token_id is None
    assert theirs.config.bos_token_id is None
    assert tokenizer.eos_token is None


def test_padding_is_cut_and_missing_biases_are_zero(tmp_path):
    export_model(small_model(padded_vocab_size=384), bpe(), tmp_path / "out", end_of_text=0, check=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (300, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 300
    assert "lm_head.weight" not in tensors
    biases = [tensor for name, tensor in tensors.items() if name.endswith("bias")]
    assert len(biases) == 6 * 3 + 1
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tensors: tensors["transformer.h.1.attn.c_proj.weight"].neg_(),
        lambda tensors: tensors["transformer.h.2.ln_2.bias"].add_(0.05),
        lambda tensors: tensors["transformer.wpe.weight"][-1, 0].add_(1),
        lambda tensors: tensors.pop("transformer.ln_f.bias"),
    ],
)
def test_a_wrong_weight_is_found_and_nothing_is_left(break_it, tmp_path, monkeypatch):
    def save(tensors, path, metadata):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        break_it(tensors)
        save_file(tensors, path, metadata)

    save_file = export.save_file
    monkeypatch.setattr(export, "save_file", save)
    with pytest.raises(ValueError, match=r"differ|did not load"):
        export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [{"activation_function": "gelu_new"}, {"scale_attn_by_inverse_layer_idx": True}, {"layer_norm_epsilon": 1e-2}],
)
def test_a_wrong_configuration_is_found(wrong, tmp_path, monkeypatch):
    right = export.to_gpt2_config
    monkeypatch.setattr(export, "to_gpt2_config", lambda *a, **k: {**right(*a, **k), **wrong})
    with pytest.raises(ValueError, match="logits of transformers differ by"):
        export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "write_tokenizer", lambda _, *rest, **named: write(TOKENIZERS["bytes"](), *rest, **named)
    )
    with pytest.raises(ValueError, match="AutoTokenizer gives other ids"):
        export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.blocks[0].feed_forward.expand.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite: export an earlier checkpoint"):
        export_model(model, bpe(), tmp_path / "out", end_of_text=0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(exported):
    before = {path: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(ValueError, match="exists: name a new folder, or export with --overwrite"):
        export_model(small_model(bias=True), bpe(), exported, end_of_text=0)
    assert {path: path.read_bytes() for path in exported.iterdir()} == before


def test_overwriting_replaces_an_exported_model_only(exported, tmp_path):
    export_model(small_model(bias=True), bpe(), exported, end_of_text=0, overwrite=True, check=False)
    assert load_file(exported / "model.safetensors")["transformer.ln_f.bias"].any()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not an exported model"):
        export_model(small_model(), bpe(), mine, end_of_text=0, overwrite=True, check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_failed_overwrite_leaves_the_old_one(exported, tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise ValueError("no")

    before = (exported / "model.safetensors").read_bytes()
    monkeypatch.setattr(export, "check_export", fail)
    with pytest.raises(ValueError, match="no"):
        export_model(small_model(bias=True), bpe(), exported, end_of_text=0, overwrite=True)
    assert (exported / "model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [exported]


def test_a_new_export_that_cannot_take_its_place_leaves_the_old_one(exported, tmp_path, monkeypatch):
    def rename(path, target):
        if path.name.startswith(".partial"):
            raise OSError("the disk is gone")
        return real(path, target)

    real, before = Path.rename, (exported / "model.safetensors").read_bytes()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        export_model(small_model(bias=True), bpe(), exported, end_of_text=0, overwrite=True, check=False)
    assert (exported / "model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [exported]


def test_a_link_is_not_overwritten(exported, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(exported)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"link (exists|is not an exported model)"):
            export_model(small_model(), bpe(), link, end_of_text=0, overwrite=overwrite)
    assert link.is_symlink()


def test_without_transformers_it_is_refused_or_unchecked(tmp_path, monkeypatch):
    monkeypatch.setattr(export_check, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sophia-lm\[hf\]', or export with --no-check"):
        export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0)
    assert list(tmp_path.iterdir()) == []
    assert export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0, check=False) is None


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 300 ids, but the model's vocabulary 257"):
        export_model(small_model(vocab_size=257), bpe(), tmp_path / "out", end_of_text=0)
    with pytest.raises(ValueError, match="end_of_text is 300"):
        export_model(small_model(), bpe(), tmp_path / "out", end_of_text=300)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*arguments, **settings):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        export_model(small_model(), bpe(), tmp_path / "out", end_of_text=0)
    assert list(tmp_path.iterdir()) == []
