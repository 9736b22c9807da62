"""Small models of transformers under the Trainer, and the plain loop that their weights are compared with."""

import contextlib
import copy

import torch
import transformers
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from sophia import SophiaG
from tests.models import seeded

transformers.utils.logging.set_verbosity_error()

VOCAB, LENGTH, CLASSES = 50, 8, 3
STEPS, ROWS, MAX_BATCH = 5, 6, 4
SETTINGS = {"lr": 1e-2, "curvature_interval": 3}


def gpt2(**settings):
    settings = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2} | settings
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **settings))


def small_llama():
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )


def llama():
    return LlamaForCausalLM(small_llama())


class TextOfImageForConditionalGeneration(LlamaPreTrainedModel):
    """Named as image-text models are: a decoder that shifts its labels, called like encoder-decoder models."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, VOCAB, bias=False)
        self.post_init()

    def forward(self, input_ids, labels, **kwargs):
        logits = self.head(self.model(input_ids).last_hidden_state)
        return {"loss": self.loss_function(logits, labels, vocab_size=VOCAB, **kwargs), "logits": logits}


def image_text():
    return TextOfImageForConditionalGeneration(small_llama())


def bert(kind, **settings):
    return kind(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            **settings,
        )
    )


def masked():
    return bert(BertForMaskedLM)


def classifier():
    return bert(BertForSequenceClassification, num_labels=CLASSES)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def bart():
    return BartForCausalLM(
        BartConfig(
            vocab_size=VOCAB,
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_position_embeddings=16,
        )
    )


def shifted(labels):
    """Position t is scored against label t + 1."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100


def where_they_stand(labels):
    return labels != -100


# Models, all but the two llamas with dropout, and which of their predictions count.
KINDS = {
    "gpt2": (gpt2, shifted),
    "llama": (llama, shifted),
    "image-text": (image_text, shifted),
    "bart": (bart, where_they_stand),  # the decoder alone, which is called causal too
    "masked": (masked, where_they_stand),
    "classifier": (classifier, where_they_stand),
    "t5": (t5, where_they_stand),
}


def dataset(rows=160, *, labels=True, classes=None, seed=3):
    """Sentences [LENGTH] with a label each, or with a label a position; a third of the labels is −100."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(rows):
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        shape, highest = ((), classes) if classes else ((LENGTH,), VOCAB)
        answer = torch.randint(0, highest, shape, generator=generator)
        answer = answer.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
        examples.append({"input_ids": tokens} | ({"labels": answer} if labels else {}))
    return examples


def data_of(kind):
    return dataset(classes=CLASSES if kind == "classifier" else None)


def collate(examples):
    return {name: torch.stack([one[name] for one in examples]) for name in examples[0]}


def arguments(folder, **settings):
    settings = {"per_device_train_batch_size": ROWS, "max_steps": STEPS, "weight_decay": 0.2} | settings
    return TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "dataloader_pin_memory": False} | settings,
    )


class Recorder(TrainerCallback):
    """What the plain loop needs to repeat a training: its batches, and the random stream it begins with."""

    def __init__(self):
        self.batches, self.generator = [], None

    def collate(self, examples):
        self.batches.append(collate(examples))
        return copy.deepcopy(self.batches[-1])

    def on_step_begin(self, args, state, control, **kwargs):
        if self.generator is None:
            self.generator = torch.get_rng_state()


def trainer(folder, model, callbacks, *, data=None, kind=SophiaG, settings=None, **arguments_):
    """A Trainer with a recorder."""
    recorder = Recorder()
    made = Trainer(
        model,
        arguments(folder, **arguments_),
        train_dataset=dataset() if data is None else data,
        data_collator=recorder.collate,
        optimizer_cls_and_kwargs=(kind, SETTINGS | (settings or {})),
        callbacks=[*callbacks, recorder],
    )
    return made, recorder


def plain_loop(model, build, refresh, recorder, *, accumulation=1, autocast=False, count=None, scale=1):
    """AdamW's loop, with a refresh before each step.

    Args:
        model: what the loop calls; in training mode.
        build: from param groups to the optimizer.
        refresh: called with (optimizer, model, the last micro-batch).
        recorder: of the Trainer's run.
        count: from all labels of a step to what the loss is divided by, on all ranks; None is the model's own mean.
        scale: factor on the loss: DDP averages over ranks.
    """
    names = Trainer.get_decay_parameter_names(None, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build(
        [
            {"params": [p for name, p in trained.items() if name in names], "weight_decay": 0.2},
            {"params": [p for name, p in trained.items() if name not in names], "weight_decay": 0.0},
        ]
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    torch.set_rng_state(recorder.generator)
    model.train()
    for step in range(STEPS):
        batches = recorder.batches[step * accumulation : (step + 1) * accumulation]
        total = None if count is None else count([batch["labels"] for batch in batches])
        for number, batch in enumerate(batches, 1):
            waits = number < accumulation and hasattr(model, "no_sync")
            with model.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    if total is None:
                        loss = model(**batch)["loss"] / accumulation
                    else:
                        loss = model(**batch, num_items_in_batch=total)["loss"] * scale
                loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            refresh(optimizer, model, batches[-1])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return optimizer


def explicit_refresh(counts):
    """A refresh from the slice that the callback takes, with the mask made here."""

    def refresh(optimizer, model, batch):
        part = {name: tensor[:MAX_BATCH] for name, tensor in batch.items()}

        def forward():
            output = model(**part)
            return (output["logits"], counts(part["labels"]))

        optimizer.refresh_curvature(forward)

    return refresh


def built(kind=SophiaG, **settings):
    return lambda groups: kind(groups, **SETTINGS, **settings)


def fresh(kind):
    return seeded(KINDS[kind][0])
