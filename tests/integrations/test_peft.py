"""LoRA by peft: adapters are trained as in the plain loop, and what is frozen is not touched."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft

from sophia import SophiaG
from sophia.integrations.transformers import SophiaCallback
from tests.integrations.trainers import (
    KINDS,
    MAX_BATCH,
    SETTINGS,
    STEPS,
    collate,
    dataset,
    explicit_refresh,
    fresh,
    plain_loop,
    shifted,
    trainer,
)
from tests.models import assert_same, curvature, same, seeded

# Of peft's own, at transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(task_type="CAUSAL_LM"):
    config = peft.LoraConfig(task_type=task_type, r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
    return seeded(lambda: peft.get_peft_model(KINDS["gpt2"][0](), config))


def parts(model):
    """Weights by name: frozen ones, adapters."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return frozen, {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_only_adapters_are_trained(model):
    (frozen, trained), (frozen_before, trained_before) = parts(model), parts(adapted())
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    assert len(frozen) > 20
    assert_same(frozen.values(), frozen_before.values())
    assert not any(same(trained[name], trained_before[name]) for name in trained)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_trainer_trains_adapters_as_the_plain_loop_does(task_type, tmp_path):
    """Bit for bit. Without a task type peft's wrapper does not say that the model inside shifts labels."""
    model, twin = adapted(task_type), adapted(task_type)
    run, recorder = trainer(tmp_path, model, [SophiaCallback(max_batch=MAX_BATCH)])
    run.train()
    optimizer = plain_loop(
        twin,
        lambda groups: SophiaG(groups, **SETTINGS),
        explicit_refresh(shifted),
        recorder,
        count=(lambda labels: sum((one != -100).sum() for one in labels)) if run.model_accepts_loss_kwargs else None,
    )
    assert_same(model.parameters(), twin.parameters())
    assert_same(curvature(run.optimizer.optimizer), curvature(optimizer))
    assert len(run.optimizer.state) == 4
    assert_only_adapters_are_trained(model)


def test_resumed_adapters_are_those_of_the_whole_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    run, _ = trainer(tmp_path, adapted(), [SophiaCallback()], **settings)
    run.train()
    again, _ = trainer(tmp_path, adapted(), [SophiaCallback()], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.model.parameters(), run.model.parameters())


@pytest.mark.parametrize("only_trainable", [True, False])
def test_plain_loop_leaves_frozen_weights_alone(only_trainable):
    model = adapted()
    params = [p for p in model.parameters() if p.requires_grad or not only_trainable]
    optimizer = SophiaG(params, **SETTINGS).attach(model)
    batch = collate(dataset(rows=6))
    for _ in range(STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.refreshes == 2
    assert {p for p in optimizer.state if optimizer.state[p]} == set(parts(model)[1].values())
    assert_only_adapters_are_trained(model)


def test_a_frozen_base_can_be_thawed_in_a_new_group():
    model = fresh("gpt2")
    for p in model.transformer.wte.parameters():
        p.requires_grad_(False)
    optimizer = SophiaG([p for p in model.parameters() if p.requires_grad], **SETTINGS).attach(model)
    batch = collate(dataset(rows=6))
    model(**batch).loss.backward()
    optimizer.step()
    before = model.transformer.wte.weight.detach().clone()
    optimizer.add_param_group({"params": [model.transformer.wte.weight.requires_grad_()]})
    for step in range(SETTINGS["curvature_interval"]):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        # Without curvature it holds still; the next refresh reaches it.
        assert torch.equal(before, model.transformer.wte.weight) == (step < 2)
