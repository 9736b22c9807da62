"""Which predictions of transformers' models count: where their own loss has a gradient, and with it hidden too."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    XLNetConfig,
    XLNetLMHeadModel,
)

from sophia.optim.labels import CountedPredictions
from tests.integrations.trainers import CLASSES, KINDS, LENGTH, VOCAB, bert, gpt2, small_llama
from tests.models import seeded

transformers.utils.logging.set_verbosity_error()

IMAGE, PATCHES = 48, 4
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def mixtral():
    """With the router's loss in its own."""
    return MixtralForCausalLM(
        MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2, output_router_logits=True)
    )


def llava():
    vision = {"model_type": "clip_vision_model", **VISION}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=small_llama(), image_token_index=IMAGE, vision_feature_layer=-1)
    )


def image_captioner():
    text = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), text)
    config.decoder_start_token_id = config.pad_token_id = 0
    return VisionEncoderDecoderModel(config)


# Models, what they are given, and how their labels belong to their predictions.
MODELS = {
    **{kind: (build, "text", None) for kind, (build, _) in KINDS.items() if kind not in ("image-text", "classifier")},
    "mixtral": (mixtral, "text", "next"),
    "bert, causal": (lambda: bert(BertLMHeadModel, is_decoder=True), "text", "next"),
    "tokens": (lambda: bert(BertForTokenClassification, num_labels=CLASSES), "tokens", "same"),
    "classifier": (lambda: bert(BertForSequenceClassification, num_labels=CLASSES), "class", "same"),
    "xlnet": (lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2)), "text", "same"),
    "llava": (llava, "picture inside", "next"),
    "captioner": (image_captioner, "picture alone", "same"),
    "git": (lambda: GitForCausalLM(GitConfig(**TEXT, vision_config=VISION)), "picture", None),
}


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    draw = torch.rand((4, LENGTH), generator=generator)
    tokens = torch.randint(2, IMAGE, (4, LENGTH), generator=generator)
    labels = torch.randint(2, IMAGE, (4, LENGTH), generator=generator).masked_fill(draw < 0.3, -100)
    if kind == "class":
        return {"input_ids": tokens, "labels": torch.tensor([0, -100, 2, 1])}
    if kind == "tokens":
        return {"input_ids": tokens, "labels": labels.where(labels < 0, labels % CLASSES)}
    if kind == "picture inside":
        tokens[:, :PATCHES] = IMAGE
        labels[:, :PATCHES] = -100
    given = {"labels": labels} if kind == "picture alone" else {"input_ids": tokens, "labels": labels}
    if "picture" in kind:
        given["pixel_values"] = torch.randn(4, 3, 8, 8, generator=generator)
    return given


@pytest.mark.parametrize("name", MODELS)
def test_predictions_count_where_the_loss_has_a_gradient(name):
    build, kind, way = MODELS[name]
    model, given = seeded(build).train(), inputs(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(**given)
    (gradient,) = torch.autograd.grad(output["loss"], output["logits"], retain_graph=True)
    counts = gradient.ne(0).any(-1)
    assert bool(counts.any())
    assert not bool(counts.all())
    labels, counted = given["labels"], CountedPredictions(model)
    assert torch.equal(counted.mask(labels, output["logits"], output, remedy=""), counts)
    if way is not None:
        assert counted._way == way
    # As behind Accelerate, a compiler or FSDP2: the loss is a number only.
    hidden = {"loss": output["loss"].detach(), "logits": output["logits"].detach()}
    if name == "git":  # predictions for the picture stand in front
        assert output["logits"].shape[1] > labels.shape[1]
        with pytest.raises(ValueError, match=r"do not say which of the predictions .*the remedy"):
            CountedPredictions(model).mask(labels, hidden["logits"], hidden, remedy="the remedy")
        return
    assert torch.equal(CountedPredictions(model).mask(labels, hidden["logits"], hidden, remedy=""), counts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_virtual_tokens_of_peft_stand_in_front():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = seeded(lambda: peft.get_peft_model(gpt2(), config))
    given = inputs("text")
    output = model(**given)
    counts = CountedPredictions(model).mask(given["labels"], output.logits, output, remedy="")
    # The last virtual token predicts the first label.
    expected = torch.cat((torch.zeros(4, 2), given["labels"] != -100, torch.zeros(4, 1)), dim=1).bool()
    assert torch.equal(counts, expected)
