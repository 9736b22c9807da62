"""attach(): the loop stays AdamW's word for word, and does what the explicit form does with the same slice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett
from tests.models import (
    Classifier,
    Snapshot,
    Tagger,
    TinyForCausalLM,
    assert_same,
    curvature,
    examples,
    same,
    seeded,
    sentences,
)

SETTINGS = {"lr": 1e-2, "curvature_interval": 3}
STEPS = 7


def train(build, *, before_step=lambda *_: None, after_step=lambda *_: None):
    """The loop that nobody wants to touch; `build` is the one line that changes."""
    model = seeded(Classifier)
    optimizer = build(model)
    torch.manual_seed(5)
    for step in range(STEPS):
        x, y = examples(seed=step)
        F.cross_entropy(model(x), y).backward()
        before_step(optimizer, model, x)
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
    return model, optimizer


def attached(model):
    return SophiaG(model.parameters(), **SETTINGS).attach(model, max_batch=5)


def unattached(model):
    return SophiaG(model.parameters(), **SETTINGS)


def test_is_equal_to_the_explicit_form_with_the_same_slice():
    model, optimizer = train(attached)
    twin, explicit = train(unattached, before_step=lambda o, m, x: o.refresh_curvature(lambda: m(x[:5])))
    assert optimizer.param_groups[0]["accepted_refreshes"] == 3
    assert_same(model.parameters(), twin.parameters())
    assert_same(curvature(optimizer), curvature(explicit))
    assert any(not same(p, q) for p, q in zip(model.parameters(), seeded(Classifier).parameters(), strict=True))


def test_random_stream_after_each_step_is_that_of_adamw():
    streams = {}
    for name, build in (("adamw", lambda m: torch.optim.AdamW(m.parameters())), ("sophia", attached)):
        streams[name] = []
        train(build, after_step=lambda _, states=streams[name]: states.append(torch.get_rng_state()))
    assert_same(streams["sophia"], streams["adamw"])


def test_statistics_of_batchnorm_are_those_before_the_refresh():
    model = seeded(Classifier)
    optimizer = attached(model)
    x, y = examples()
    F.cross_entropy(model(x), y).backward()
    before = [buffer.clone() for buffer in model.buffers()]
    optimizer.step()
    assert model.calls == 2
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1
    assert_same(model.buffers(), before)
    assert int(model.norm.num_batches_tracked) == 1


def test_trap_5_accumulation_takes_the_last_micro_batch_and_leaves_its_gradients():
    def accumulate(optimizer, model, refresh):
        for micro in range(3):
            x, y = examples(seed=micro)
            (F.cross_entropy(model(x), y) / 3).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        refresh(x)
        optimizer.step()
        assert_same((p.grad for p in model.parameters()), grads)

    model, twin = (seeded(lambda: Classifier(dropout=0)) for _ in range(2))
    optimizer, explicit = attached(model), unattached(twin)
    accumulate(optimizer, model, lambda x: None)
    accumulate(explicit, twin, lambda x: explicit.refresh_curvature(lambda: twin(x[:5])))
    assert_same(curvature(optimizer), curvature(explicit))
    assert_same(model.parameters(), twin.parameters())


def test_under_gradscaler_is_equal_to_the_loop_without():
    plain, _ = train(attached)
    model = seeded(Classifier)
    optimizer, scaler = attached(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    torch.manual_seed(5)
    for step in range(STEPS):
        x, y = examples(seed=step)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_same(model.parameters(), plain.parameters())  # a power of two scales exactly


def test_step_withheld_by_gradscaler_is_no_step_and_the_next_one_refreshes():
    model = seeded(Classifier)
    optimizer, scaler = attached(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    (x, y), (later, _) = examples(seed=0), examples(seed=1)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    model.outer.bias.grad[0] = float("inf")
    before = Snapshot(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same(model.parameters(), before.values)
    assert optimizer.param_groups[0]["clock"] == 0
    assert optimizer.curvature_due
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(later), y)).backward()
    twin = copy.deepcopy(model)
    explicit = unattached(twin)
    explicit.refresh_curvature(lambda: twin(later[:5]))
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["clock"] == 1
    assert_same(curvature(optimizer), curvature(explicit))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_remembers_the_autocast_state_of_the_training_forward(dtype):
    def refreshed(model, *, autocast):
        optimizer = unattached(model)
        with torch.autocast("cpu", dtype, enabled=autocast):
            optimizer.refresh_curvature(lambda: model(x[:5]))
        return curvature(optimizer)

    x, y = examples()
    model = seeded(Classifier)
    optimizer = attached(model)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    F.cross_entropy(logits.float(), y).backward()
    expected, other = refreshed(copy.deepcopy(model), autocast=True), refreshed(copy.deepcopy(model), autocast=False)
    optimizer.step()  # outside the autocast region
    assert_same(curvature(optimizer), expected)
    assert any(not same(h, o) for h, o in zip(expected, other, strict=True))


def test_function_for_the_logits_runs_under_the_autocast_state_too():
    body, head = seeded(lambda: nn.Linear(6, 8)), seeded(lambda: nn.Linear(8, 5))
    x, _ = examples()
    optimizer = SophiaG([*body.parameters(), *head.parameters()]).attach(body, logits=head)
    explicit = SophiaG([*body.parameters(), *head.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        head(body(x)).sum().backward()
        explicit.refresh_curvature(lambda: head(body(x[:8])))
    optimizer.step()
    assert_same(curvature(optimizer), curvature(explicit))


def test_sophia_h_takes_inputs_that_only_autocast_could_mix_with_the_parameters():
    class Loss(nn.Linear):
        def forward(self, x, y):
            return F.cross_entropy(super().forward(x), y)

    model = seeded(lambda: Loss(6, 5))
    optimizer = SophiaH(model.parameters()).attach(model)
    x, y = examples()
    with torch.autocast("cpu", torch.bfloat16):
        model(x.bfloat16(), y).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1
    assert {h.dtype for h in curvature(optimizer)} == {torch.float32}


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("kind", [Tagger, TinyForCausalLM])
def test_traps_6_and_7_ignored_labels_do_not_count(kind, keyword):
    tokens, labels = sentences()
    labels[0], labels[1, 2:] = -100, -100  # a whole row, and the end of one
    model = seeded(kind)
    optimizer = unattached(model).attach(model, max_batch=4)
    loss = (model(tokens, labels=labels) if keyword else model(tokens, labels)).loss
    loss.backward()
    optimizer.step()

    counts = labels[:4] != -100
    if kind is TinyForCausalLM:  # the prediction at t is scored against label t + 1; the last one against nothing
        counts = torch.stack([torch.roll(row, -1) for row in counts])
        counts[:, -1] = False
    assert bool(counts.any())
    assert not bool(counts.all())
    twin = seeded(kind)
    explicit = unattached(twin)
    explicit.refresh_curvature(lambda: (twin(tokens[:4]).logits, counts))
    assert_same(curvature(optimizer), curvature(explicit))


def test_logits_and_mask_may_be_functions():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.tagger = Tagger()

        def forward(self, batch, pad):
            return "features", {"scores": self.tagger(batch["tokens"]).logits}

    tokens, _ = sentences()
    pad = torch.arange(6) >= torch.arange(12).unsqueeze(1) % 6
    model = seeded(Pair)
    optimizer = unattached(model).attach(
        model, logits=lambda output: output[1]["scores"], mask=lambda batch, pad: ~pad, max_batch=7
    )
    model({"tokens": tokens}, pad=pad)[1]["scores"].sum().backward()
    optimizer.step()
    twin = seeded(Pair)
    explicit = unattached(twin)
    explicit.refresh_curvature(lambda: (twin.tagger(tokens[:7]).logits, ~pad[:7]))
    assert_same(curvature(optimizer), curvature(explicit))


def test_evaluation_and_no_grad_forwards_are_ignored():
    (x, y), (other, _) = examples(seed=1), examples(seed=2)
    model = seeded(Classifier)
    optimizer = attached(model)
    F.cross_entropy(model(x), y).backward()
    model.eval()
    model(other)
    model.train()
    with torch.no_grad():
        model(other)
    optimizer.step()
    twin = seeded(Classifier)
    explicit = unattached(twin)
    explicit.refresh_curvature(lambda: twin(x[:5]))
    assert_same(curvature(optimizer), curvature(explicit))


def test_sophia_h_takes_the_loss_of_the_models_output():
    tokens, labels = sentences()
    model, twin = seeded(TinyForCausalLM), seeded(TinyForCausalLM)
    optimizer = SophiaH(model.parameters(), **SETTINGS).attach(model, max_batch=4)
    explicit = SophiaH(twin.parameters(), **SETTINGS)
    model(tokens, labels=labels).loss.backward()
    optimizer.step()
    explicit.refresh_curvature(lambda: twin(tokens[:4], labels=labels[:4]).loss)
    assert_same(curvature(optimizer), curvature(explicit))
    assert any(bool((h != 0).any()) for h in curvature(optimizer))


@pytest.mark.parametrize(("rows", "used"), [(3, 3), (8, 8), (20, 8)])
def test_chunks_are_slices_also_when_there_are_fewer_rows_than_chunks(rows, used):
    # For y = w·x under a squared loss a row's sampled gradient with sign noise is ±√2 x: squared row by row, the noise
    # is gone, and what is left says which rows were used, how they were cut, and what the sum was divided by.
    model = seeded(lambda: nn.Linear(6, 1, bias=False))
    estimator = GaussNewtonBartlett(likelihood="gaussian", noise="signs", chunks=8)
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), estimator=estimator).attach(model)
    x, _ = examples(rows)
    model(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(curvature(optimizer)[0], 2 * x[:used].square().mean(0, keepdim=True))


def test_chunks_are_contiguous_slices():
    x, y = examples(rows=10)
    model, twin = seeded(lambda: Classifier(dropout=0)), seeded(lambda: Classifier(dropout=0))
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(chunks=2)).attach(model, max_batch=8)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    explicit = SophiaG(twin.parameters())
    explicit.refresh_curvature([lambda: twin(x[:4]), lambda: twin(x[4:8])])
    assert_same(curvature(optimizer), curvature(explicit))


def test_closure_sees_gradients_and_its_forward_is_the_one_remembered():
    x, y = examples()
    model, twin = seeded(Classifier), seeded(Classifier)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer = attached(model)
    torch.manual_seed(5)
    loss = optimizer.step(closure)
    torch.manual_seed(5)
    explicit = unattached(twin)
    expected = F.cross_entropy(twin(x), y)
    expected.backward()
    explicit.refresh_curvature(lambda: twin(x[:5]))
    explicit.step()
    assert same(loss, expected)
    assert_same(model.parameters(), twin.parameters())
