"""attach(): which predictions count is read from the model's own loss, whatever its class is called."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett
from sophia.optim import labels as reading
from sophia.optim.labels import CountedPredictions, shifts_labels
from tests.models import VOCAB, Output, Tagger, TinyForCausalLM, assert_same, curvature, seeded, sentences

ROWS, LENGTH, PREFIX = 8, 6, 3


class StandingForCausalLM(TinyForCausalLM):
    """Named as BART's decoder is, which compares labels where they stand."""

    loss = Tagger.loss


class Moving(Tagger):
    """Compares position t with label t + 1, and does not say so."""

    loss = TinyForCausalLM.loss


class Auxiliary(StandingForCausalLM):
    """A loss with a term of its own, as mixtures of experts have, and label smoothing: no plain cross-entropy."""

    def loss(self, logits, labels):
        smooth = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
        return smooth + self.embed.weight.square().mean()


class Prefixed(Tagger):
    """Predictions for a picture stand in front of those for the text, which is moved along; the last of those in front
    is that of the first label."""

    def forward(self, tokens, labels=None):
        tokens = F.pad(tokens, (PREFIX, 0))
        labels = None if labels is None else F.pad(labels, (PREFIX, 0), value=-100)
        output = super().forward(tokens, labels)
        return output

    loss = TinyForCausalLM.loss


class Targets(Tagger):
    """Another name, another ignored label, a tuple."""

    def forward(self, tokens, targets):
        logits = super().forward(tokens).logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Half(Tagger):
    """Logits of fp16, and predictions that are nearly certain: their share of the mean is less than fp16 holds."""

    def forward(self, tokens, labels):
        logits = (10 * super().forward(tokens).logits + 11 * F.one_hot(labels.clamp(min=0), VOCAB)).half()
        return Output(logits, F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))


class Cast(nn.Module):
    """Hides the way from the logits to the loss, as Accelerate's cast of a model's outputs does."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *args, **kwargs):
        output = self._orig_mod(*args, **kwargs)
        return Output(output.logits.clone(), output.loss)


def standing(labels):
    return labels != -100


def moved(labels):
    return F.pad(labels[:, 1:], (0, 1), value=-100) != -100


def in_front(labels):
    return moved(F.pad(labels, (PREFIX, 0), value=-100))


def assert_counts(model, batch, counts, *, logits=lambda output: output.logits, steps=1):
    """An attached optimizer has the curvature of one that is told which predictions count, at each refresh."""
    twin = copy.deepcopy(model)
    told = SophiaG(twin.parameters(), curvature_interval=1)
    optimizer = SophiaG(model.parameters(), curvature_interval=1).attach(model, logits, max_batch=ROWS)
    for _ in range(steps):
        told.refresh_curvature(lambda: (logits(twin(**batch)), counts))
        for each, one in ((twin, told), (model, optimizer)):
            output = each(**batch)
            (output.loss if isinstance(output, Output) else output[1]).backward()
            one.step()
            one.zero_grad()
        assert_same(curvature(optimizer), curvature(told))


@pytest.fixture
def batch():
    tokens, labels = sentences(rows=ROWS, length=LENGTH)
    labels[:, :2] = -100  # a prompt: labels that are moved along are others
    return {"tokens": tokens, "labels": labels}


KINDS = {
    "as most": (Tagger, standing),
    "causal": (TinyForCausalLM, moved),
    "causal by name only": (StandingForCausalLM, standing),
    "causal without saying so": (Moving, moved),
    "loss with other terms": (Auxiliary, standing),
    "predictions in front": (Prefixed, in_front),
}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_count_that_the_loss_depends_on(kind, batch):
    build, counts = KINDS[kind]
    assert_counts(seeded(build), batch, counts(batch["labels"]), steps=2)


@pytest.mark.parametrize("kind", ["as most", "causal", "causal by name only", "causal without saying so"])
def test_where_a_wrapper_hides_how_the_loss_is_compared(kind, batch):
    build, counts = KINDS[kind]
    assert_counts(Cast(seeded(build)), batch, counts(batch["labels"]), steps=2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_the_compiler(backend, batch):
    torch.compiler.reset()
    model = torch.compile(seeded(StandingForCausalLM), backend=backend)
    assert_counts(model, batch, standing(batch["labels"]))


@pytest.mark.parametrize("unused", [False, True])
def test_under_ddp(unused, batch, tmp_path):
    """With find_unused_parameters a model's outputs are not those that its loss was made from."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(seeded(StandingForCausalLM), find_unused_parameters=unused)
        assert_counts(model, batch, standing(batch["labels"]))
    finally:
        torch.distributed.destroy_process_group()


def test_where_both_ways_are_as_near_the_class_tells(batch):
    """A head of zeros has the same loss for any labels."""
    for build, counts in (KINDS["as most"], KINDS["causal"]):
        model = seeded(build)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        assert_counts(Cast(model), batch, counts(batch["labels"]))


def test_other_names_and_another_ignored_label(batch):
    targets = batch["labels"].masked_fill(batch["labels"] == -100, -1)
    inputs = {"tokens": batch["tokens"], "targets": targets}
    assert_counts(seeded(Targets), inputs, targets != -1, logits=lambda output: output[0])


def test_labels_that_are_moved_along_already(batch):
    """`shift_labels` of transformers."""

    class Model(Tagger):
        def forward(self, tokens, labels, shift_labels):
            return super().forward(tokens, shift_labels)

    shift_labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for model in (seeded(Model), Cast(seeded(Model))):
        assert_counts(model, batch | {"shift_labels": shift_labels}, moved(batch["labels"]))


def test_predictions_that_are_nearly_certain_count_in_half_precision(batch):
    model = seeded(Half)
    output = model(**batch)
    (lost,) = torch.autograd.grad(output.loss / 2**10, output.logits)
    assert bool((~lost.ne(0).any(-1) & standing(batch["labels"])).any())  # or this test shows nothing
    output = model(**batch)
    counts = CountedPredictions(model).mask(batch["labels"], output.logits, output, remedy="")
    assert torch.equal(counts, standing(batch["labels"]))


def test_masked_patches_count_without_any_labels():
    """As in a masked autoencoder, whose loss is that of hidden patches only."""

    class Autoencoder(nn.Linear):
        def forward(self, patches, hidden):
            y = super().forward(patches * ~hidden[..., None])
            return Output(y, (y - patches).square()[hidden].mean())

    model, patches = seeded(lambda: Autoencoder(4, 4)), torch.randn(ROWS, 5, 4)
    hidden = torch.rand(ROWS, 5) < 0.6
    estimator = GaussNewtonBartlett(likelihood="gaussian")
    twin = copy.deepcopy(model)
    optimizer = SophiaG(model.parameters(), estimator=estimator).attach(model)
    told = SophiaG(twin.parameters(), estimator=estimator)
    model(patches, hidden).loss.backward()
    optimizer.step()
    told.refresh_curvature(lambda: (twin(patches, hidden).logits, hidden))
    assert_same(curvature(optimizer), curvature(told))


def test_it_is_found_out_once(batch, monkeypatch):
    asked = []
    monkeypatch.setattr(reading, "_gradient", lambda *both, real=reading._gradient: asked.append(1) or real(*both))
    assert_counts(seeded(Moving), batch, moved(batch["labels"]), steps=3)
    assert len(asked) == 1
    assert_counts(seeded(Prefixed), batch, in_front(batch["labels"]), steps=3)
    assert len(asked) == 4  # fits neither way, and is asked for each time


def test_labels_that_tell_nothing_decide_nothing(batch):
    """Both ways are one where all is −100; the next refresh tells."""
    counted = CountedPredictions(seeded(Moving))
    model = seeded(Moving)
    nothing = torch.full_like(batch["labels"], -100)
    output = model(batch["tokens"], nothing)
    assert not bool(counted.mask(nothing, output.logits, output, remedy="").any())
    output = model(**batch)
    assert torch.equal(counted.mask(batch["labels"], output.logits, output, remedy=""), moved(batch["labels"]))


@pytest.mark.parametrize("kind", ["as most", "causal"])
def test_labels_all_ignored_are_an_error(kind, batch):
    model = seeded(KINDS[kind][0])
    optimizer = SophiaG(model.parameters()).attach(model)
    model(batch["tokens"], torch.full_like(batch["labels"], -100))
    with pytest.raises(ValueError, match="no prediction counts on any rank"):
        optimizer.step()


def test_classes_that_are_not_the_last_dimension_are_an_error():
    """As in segmentation: the softmax is over dimension 1, and the loss depends on all rows of the picture."""

    class Segmenter(nn.Conv2d):
        def forward(self, images, labels):
            logits = super().forward(images)
            return Output(logits, F.cross_entropy(logits, labels))

    model = seeded(lambda: Segmenter(1, 3, 1))
    optimizer = SophiaG(model.parameters()).attach(model)
    model(torch.randn(2, 1, 4, 6), torch.randint(0, 3, (2, 4, 6))).loss.backward()
    with pytest.raises(ValueError, match=r"labels of shape \(2, 4, 6\) .* predictions of shape \(2, 3, 4\) .*mask="):
        optimizer.step()


def test_classes_are_read_through_wrappers():
    causal = seeded(TinyForCausalLM)
    assert shifts_labels(causal)
    assert shifts_labels(Cast(causal))
    peft = nn.Module()
    peft.get_base_model = lambda: causal
    assert shifts_labels(peft)
    assert not shifts_labels(Cast(seeded(Tagger)))
    for decoder_only in (True, False):  # image-text models and encoder-decoders name their loss alike
        model = seeded(Tagger)
        model.loss_type, model.config = (
            "ForConditionalGeneration",
            SimpleNamespace(is_encoder_decoder=not decoder_only),
        )
        assert shifts_labels(model) == decoder_only
