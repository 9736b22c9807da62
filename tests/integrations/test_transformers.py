"""Under Hugging Face's Trainer: the very weights of the plain loop, and clear words for everything else."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertForQuestionAnswering, BertForSequenceClassification, Trainer

from sophia import SophiaG, SophiaH, SophiaK
from sophia.curvature import GaussNewtonBartlett
from sophia.integrations.transformers import SophiaCallback
from tests.integrations.trainers import (
    KINDS,
    LENGTH,
    MAX_BATCH,
    ROWS,
    SETTINGS,
    STEPS,
    Recorder,
    arguments,
    bert,
    built,
    collate,
    data_of,
    dataset,
    explicit_refresh,
    fresh,
    plain_loop,
    trainer,
)
from tests.models import assert_same, curvature, same, seeded


def callback(**settings):
    return SophiaCallback(max_batch=MAX_BATCH, **settings)


def inner(run):
    """The optimizer inside Accelerate's wrapper."""
    return run.optimizer.optimizer


def counter(run):
    """What the Trainer divides the loss by; from transformers 5.0 to 5.23 it learned which models shift labels."""
    first = 1 if getattr(run, "_loss_shifts_labels", False) else 0
    return lambda labels: sum((one[..., first:] != -100).sum() for one in labels)


# ---- the plain loop's weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_plain_loop(kind, tmp_path):
    """Bit for bit; with dropout, accumulation, clipping, a schedule and labels of −100."""
    counts = KINDS[kind][1]
    model, twin = fresh(kind), fresh(kind)
    run, recorder = trainer(tmp_path, model, [callback()], data=data_of(kind), gradient_accumulation_steps=2)
    run.train()
    count = counter(run) if run.model_accepts_loss_kwargs else None
    optimizer = plain_loop(twin, built(), explicit_refresh(counts), recorder, accumulation=2, count=count)
    assert inner(run).refreshes == optimizer.refreshes == 2
    assert_same(model.parameters(), twin.parameters())
    assert_same(curvature(inner(run)), curvature(optimizer))
    before = dict(fresh(kind).named_parameters())
    unused = "encoder_attn"  # of BART's decoder without an encoder
    assert not any(same(p, before[name]) for name, p in model.named_parameters() if unused not in name)


def test_bf16_is_the_plain_loop_under_autocast(tmp_path):
    """Bit for bit."""
    model, twin = fresh("gpt2"), fresh("gpt2")
    run, recorder = trainer(tmp_path, model, [callback()], bf16=True)
    run.train()
    optimizer = plain_loop(
        twin, built(), explicit_refresh(KINDS["gpt2"][1]), recorder, autocast=True, count=counter(run)
    )
    assert_same(curvature(inner(run)), curvature(optimizer))
    assert_same(model.parameters(), twin.parameters())


def test_sophia_k_too(tmp_path):
    """With groups of its own making: the Trainer's do not tell embeddings from hidden matrices."""
    model, twin, recorder = fresh("gpt2"), fresh("gpt2"), Recorder()
    run = Trainer(
        model,
        arguments(tmp_path, weight_decay=0.0),
        train_dataset=dataset(),
        data_collator=recorder.collate,
        optimizers=(SophiaK(SophiaK.groups(model), **SETTINGS), None),
        callbacks=[callback(), recorder],
    )
    run.train()

    def build(_):
        return SophiaK(SophiaK.groups(twin), **SETTINGS)

    plain_loop(twin, build, explicit_refresh(KINDS["gpt2"][1]), recorder, count=counter(run))
    assert inner(run).refreshes == 2
    assert_same(model.parameters(), twin.parameters())


def test_sophia_h_takes_the_mean_loss_of_the_slice(tmp_path):
    """Not the Trainer's sum over the slice, divided by the number of labels in the whole batch."""

    def refresh(optimizer, model, batch):
        optimizer.refresh_curvature(lambda: model(**{name: tensor[:MAX_BATCH] for name, tensor in batch.items()}).loss)

    model, twin = fresh("gpt2"), fresh("gpt2")
    run, recorder = trainer(tmp_path, model, [callback()], kind=SophiaH, gradient_accumulation_steps=2)
    run.train()
    optimizer = plain_loop(twin, built(SophiaH), refresh, recorder, accumulation=2, count=counter(run))
    assert_same(curvature(inner(run)), curvature(optimizer))
    assert_same(model.parameters(), twin.parameters())


def test_optimizer_that_the_user_builds_is_as_good(tmp_path):
    model, twin = fresh("gpt2"), fresh("gpt2")
    run, _ = trainer(tmp_path, model, [callback()])
    run.train()
    names = Trainer.get_decay_parameter_names(None, twin)
    groups = [
        {"params": [p for name, p in twin.named_parameters() if name in names]},
        {"params": [p for name, p in twin.named_parameters() if name not in names], "weight_decay": 0.0},
    ]
    other = Trainer(
        twin,
        arguments(tmp_path),
        train_dataset=dataset(),
        data_collator=collate,
        optimizers=(SophiaG(groups, **SETTINGS), None),
    )
    other.add_callback(callback())
    other.train()
    assert_same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_resumed_training_ends_with_the_same_weights(kind, tmp_path):
    """Bit for bit, from a checkpoint between two refreshes."""
    model = fresh("gpt2")
    run, _ = trainer(tmp_path, model, [callback()], kind=kind, save_strategy="steps", save_steps=2)
    run.train()
    again, _ = trainer(tmp_path, seeded(KINDS["gpt2"][0], seed=9), [callback()], kind=kind)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == STEPS
    assert inner(again).refreshes == 2
    assert_same(again.model.parameters(), model.parameters())
    assert_same(curvature(inner(again)), curvature(inner(run)))


def test_second_training_goes_on_with_the_same_optimizer(tmp_path):
    model = fresh("gpt2")
    run, _ = trainer(tmp_path, model, [callback()])
    run.train()
    assert not model._forward_pre_hooks
    first = inner(run).refreshes
    run.train()
    assert inner(run).refreshes > first
    assert inner(run)._attachment is None


def test_training_that_was_broken_off_can_be_begun_again(tmp_path, monkeypatch):
    model = fresh("gpt2")
    run, _ = trainer(tmp_path, model, [callback()])
    with monkeypatch.context() as patch:
        patch.setattr(run, "training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train()
    run.train()
    assert inner(run).refreshes == 2


def test_compiled_model_is_refreshed(tmp_path):
    model, twin = fresh("llama"), fresh("llama")
    run, recorder = trainer(tmp_path, model, [callback()], torch_compile=True, torch_compile_backend="eager")
    run.train()
    optimizer = plain_loop(twin, built(), explicit_refresh(KINDS["llama"][1]), recorder, count=counter(run))
    assert_same(model.parameters(), twin.parameters())
    assert_same(curvature(inner(run)), curvature(optimizer))


def test_logs_have_the_clipped_fraction(tmp_path):
    run, _ = trainer(tmp_path, fresh("gpt2"), [callback()], logging_steps=1)
    run.train()
    *steps, last = run.state.log_history
    assert len(steps) == STEPS
    assert all(0 < line["clip_fraction"] <= 1 for line in steps)
    assert steps[-1]["clip_fraction"] == float(inner(run).stats()["clip_fraction"])
    assert "clip_fraction" not in last


# ---- which predictions count


def test_loss_outside_of_the_model_needs_a_mask(tmp_path):
    def loss(output, labels, num_items_in_batch):
        return torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum") / (
            num_items_in_batch
        )

    def make(model, **settings):
        run, _ = trainer(tmp_path, model, [callback(**settings)])
        run.compute_loss_func = loss
        return run

    model = fresh("gpt2")
    run = make(model)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel was called without labels .* SophiaCallback\(mask=\.\.\.\)"):
        run.train()
    assert_same(model.parameters(), fresh("gpt2").parameters())
    seen = []

    def mask(input_ids, **_):
        seen.append(input_ids.shape)
        return input_ids != 0

    make(model, mask=mask).train()
    assert seen == [(MAX_BATCH, LENGTH)] * 2
    with pytest.raises(ValueError, match=r"mask=\.\.\.\) gave a torch.int64: .* bool tensor of shape \(4, 8\)"):
        make(fresh("gpt2"), mask=lambda input_ids, **_: input_ids).train()


@pytest.mark.parametrize(
    ("classes", "labels", "problem_type", "likelihood"),
    [
        (1, torch.rand(160), "regression", "gaussian"),
        (3, torch.rand(160, 3).round(), "multi_label_classification", "bernoulli"),
    ],
)
def test_heads_of_another_likelihood_need_its_estimator(classes, labels, problem_type, likelihood, tmp_path):
    data = [one | {"labels": label} for one, label in zip(dataset(), labels, strict=True)]

    def train(**settings):
        model = seeded(lambda: bert(BertForSequenceClassification, num_labels=classes))
        run, _ = trainer(tmp_path, model, [callback()], data=data, settings=settings)
        run.train()
        return inner(run)

    message = (
        f"problem_type='{problem_type}'.*estimator=sophia.curvature.GaussNewtonBartlett(likelihood=\"{likelihood}\")"
    )
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        train()
    optimizer = train(estimator=GaussNewtonBartlett(likelihood=likelihood))
    assert optimizer.refreshes == 2


def test_a_model_of_ones_own_may_have_another_likelihood(tmp_path):
    class Regression(torch.nn.Linear):
        def forward(self, x, labels):
            y = super().forward(x)
            return {"loss": torch.nn.functional.mse_loss(y, labels), "logits": y}

    data = [{"x": torch.randn(3), "labels": torch.randn(2)} for _ in range(ROWS * STEPS)]
    estimator = GaussNewtonBartlett(likelihood="gaussian")
    run, _ = trainer(
        tmp_path,
        seeded(lambda: Regression(3, 2)),
        [callback()],
        data=data,
        settings={"estimator": estimator, "curvature_interval": 1},
    )
    run.train()
    assert inner(run).refreshes == STEPS


def test_labels_that_do_not_fit_the_predictions_ask_for_a_mask(tmp_path):
    run, _ = trainer(tmp_path, fresh("masked"), [callback(logits=lambda output: output.logits[:, 1:])])
    with pytest.raises(ValueError, match=r"labels of shape \(4, 8\) .* predictions of shape \(4, 7\) .*mask="):
        run.train()


# ---- settings that the Trainer has too


DECAY = {
    "its default, 0": (
        {"weight_decay": 0.0},
        {},
        r"SophiaG's weight_decay=0.2 is replaced by TrainingArguments\(weight_decay=0\)",
    ),
    "another than the optimizer's": (
        {"weight_decay": 0.1},
        {"weight_decay": 0.3},
        r"weight_decay=0.3 is replaced .*=0.1\)",
    ),
    "in place of the optimizer's default": ({"weight_decay": 0.1}, {}, None),
    "the optimizer's": ({"weight_decay": 0.3}, {"weight_decay": 0.3}, None),
    "both 0": ({"weight_decay": 0.0}, {"weight_decay": 0.0}, None),
    "a learning rate": (
        {"learning_rate": 3e-4},
        {},
        r"TrainingArguments\(learning_rate=0.0003\) has no effect .* 0.01",
    ),
    "the same learning rate": ({"learning_rate": 1e-2}, {}, None),
}


@pytest.mark.parametrize("case", DECAY)
def test_settings_that_do_nothing_are_named(case, tmp_path):
    in_arguments, in_optimizer, message = DECAY[case]
    run, _ = trainer(tmp_path, fresh("gpt2"), [callback()], settings=in_optimizer, max_steps=1, **in_arguments)
    if message is None:
        run.train()  # a warning would be an error
        return
    with pytest.warns(UserWarning, match=message):
        run.train()


def test_decay_without_effect_on_the_users_own_optimizer_is_named(tmp_path):
    model = fresh("gpt2")
    run = Trainer(
        model,
        arguments(tmp_path, max_steps=1, weight_decay=0.1),
        train_dataset=dataset(),
        optimizers=(SophiaG(model.parameters(), **SETTINGS), None),
        callbacks=[callback()],
    )
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1\) has no effect .* SophiaG decays by 0\.2"):
        run.train()


# ---- mistakes


def test_forgotten_callback_is_named_at_the_first_step(tmp_path):
    model = fresh("gpt2")
    run, _ = trainer(tmp_path, model, [])
    with pytest.raises(
        RuntimeError, match=r"sign-momentum(.|\n)*Transformers: Trainer\(callbacks=\[SophiaCallback\(\)\]\)"
    ):
        run.train()
    assert_same(model.parameters(), fresh("gpt2").parameters())


def test_model_without_logits_is_named_at_the_first_step(tmp_path):
    def data():
        for one in dataset(labels=False):
            yield one | {"start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}

    model, before = (seeded(lambda: bert(BertForQuestionAnswering)) for _ in range(2))
    run, _ = trainer(tmp_path, model, [callback()], data=list(data()))
    with pytest.raises(
        ValueError, match=r"needs logits, and the output of BertForQuestionAnswering, .*start_logits.*logits=\.\.\."
    ):
        run.train()
    assert_same(model.parameters(), before.parameters())


def test_model_that_returns_a_tuple_is_named(tmp_path):
    class Pair(torch.nn.Linear):
        def forward(self, x, labels):
            logits = super().forward(x)
            return torch.nn.functional.cross_entropy(logits, labels), logits

    data = [{"x": torch.ones(3), "labels": torch.tensor(1)}] * ROWS * STEPS
    run, _ = trainer(tmp_path, seeded(lambda: Pair(3, 2)), [callback()], data=data)
    with pytest.raises(ValueError, match="the output of Pair, a tuple of 2, has none"):
        run.train()
    run, _ = trainer(tmp_path, seeded(lambda: Pair(3, 2)), [callback(logits=lambda output: output[1])], data=data)
    run.train()
    assert inner(run).refreshes == 2


def test_sophia_h_without_a_loss_is_told(tmp_path):
    run, _ = trainer(tmp_path, fresh("gpt2"), [callback()], kind=SophiaH, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"SophiaH needs the loss.*label_smoothing_factor"):
        run.train()


def test_labels_that_are_all_masked_are_named_at_the_first_step(tmp_path):
    data = [one | {"labels": torch.full((LENGTH,), -100)} for one in dataset()]
    run, _ = trainer(tmp_path, fresh("gpt2"), [callback()], data=data)
    with pytest.raises(ValueError, match=r"no prediction counts on any rank: .*-100"):
        run.train()


def test_other_optimizers_are_refused(tmp_path):
    run, _ = trainer(tmp_path, fresh("gpt2"), [callback()], kind=torch.optim.AdamW, settings={"lr": 1e-3})
    run.optimizer_cls_and_kwargs = (torch.optim.AdamW, {})
    with pytest.raises(
        ValueError, match=r"this Trainer's is AdamW: pass Trainer\(optimizer_cls_and_kwargs=\(sophia\.SophiaG"
    ):
        run.train()
    model = fresh("gpt2")
    with pytest.raises(ValueError, match="this Trainer's is SGD"):
        Trainer(
            model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None), callbacks=[callback()]
        )


def test_attached_optimizer_is_refused(tmp_path):
    model = fresh("gpt2")
    attached = SophiaG(model.parameters(), **SETTINGS).attach(model)
    run = Trainer(
        model, arguments(tmp_path), train_dataset=dataset(), optimizers=(attached, None), callbacks=[callback()]
    )
    with pytest.raises(ValueError, match=r"attached already: leave out either \.attach\(model\) or SophiaCallback"):
        run.train()


ENGINES = {
    "deepspeed": ({"deepspeed": "ds.json"}, "does not work under DeepSpeed.*fsdp=True"),
    "deepspeed by accelerate": ({"deepspeed_plugin": object()}, "DeepSpeed"),
    "data parallel": ({"_n_gpu": 2}, r"nn\.DataParallel.*torchrun --nproc-per-node=2"),
    "fsdp1": ({"fsdp_plugin_args": {"fsdp_version": 1}}, "FSDP1"),
    "tensor parallel": ({"parallelism_config": SimpleNamespace(tp_enabled=True, tp_size=2)}, "tp_size=2"),
    "context parallel": ({"parallelism_config": SimpleNamespace(cp_enabled=True, cp_size=4)}, "cp_size=4"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_do_not_work_are_refused_by_the_constructor(engine, tmp_path):
    settings, message = ENGINES[engine]
    args = arguments(tmp_path)
    assert args.n_gpu <= 1
    for name, value in settings.items():
        setattr(args, name, value)
    # The event by which the Trainer's constructor ends: the engines themselves are not here.
    with pytest.raises(ValueError, match=message):
        callback().on_init_end(args, None, None, optimizer=None)


def test_missing_transformers_is_named_with_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("transformers")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sophia.integrations.transformers")
    with pytest.raises(ImportError, match=re.escape("pip install 'sophia-lm[hf]'")):
        importlib.import_module("sophia.integrations.transformers")


# ---- the documentation


PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "transformers.md"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the data loader's where there is no GPU
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
def test_code_of_the_documentation_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "peft" in code:
        pytest.importorskip("peft")
    data = [one | {"attention_mask": torch.ones(LENGTH, dtype=torch.int64)} for one in dataset(rows=8)]
    scope = {"model": fresh("gpt2"), "dataset": data}
    exec(compile(code, str(PAGE), "exec"), scope)
    assert inner(scope["trainer"]).refreshes == 1
