"""`attach` under DDP and FSDP2: the loop stays AdamW's, the run is the explicit one's."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from tests.distributed import engines

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
LOOPS = [(2, 1, SophiaG), (4, 3, SophiaG), (2, 3, SophiaH)]  # ranks, micro-batches, optimizer
MAX_BATCH = 3  # less than each rank has


def loss_of(output, targets):
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def train(engine, form, accumulation, kind):
    """Four steps. Forms: the wrapper attached, the bare module inside it attached, or the explicit refresh."""
    torch.manual_seed(engines.place()[0])
    net = engines.build(dropout=0.1)
    model = engines.wrap(engine, net)
    # Finite differences, so that the bare module is not differentiated twice where the wrapper cannot be.
    estimator = Hutchinson(product="finite_difference") if kind is SophiaH else None
    optimizer = kind(model.parameters(), lr=1e-2, curvature_interval=2, estimator=estimator)
    if form != "explicit":
        optimizer.attach(net if form == "bare" else model, logits=shape_for(kind), max_batch=MAX_BATCH)
    own = engines.own_rows()
    for step in range(4):
        for part in range(accumulation):
            tokens, targets = engines.batch(step * accumulation + part)
            last = part == accumulation - 1
            with reduction(model, engine, last):
                (loss_of(model(tokens[own]), targets[own]) / accumulation).backward()
        if form == "explicit":
            tokens = tokens[own][:MAX_BATCH]
            optimizer.refresh_curvature(lambda tokens=tokens: shape_for(kind)(model(tokens)))
        optimizer.step()
        optimizer.zero_grad()
    return engines.snapshot(model, optimizer), torch.rand(1)


def shape_for(kind):
    """From logits to what the optimizer's estimator wants."""
    return torch.Tensor.clone if kind is SophiaG else mean_square


def mean_square(logits):
    return logits.square().mean()


def reduction(model, engine, wanted):
    if engine == "fsdp":
        model.set_requires_gradient_sync(wanted)
    return model.no_sync() if engine == "ddp" and not wanted else contextlib.nullcontext()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize(("world", "accumulation", "kind"), LOOPS)
def test_attached_wrapper_is_the_explicit_form(ranks, engine, world, accumulation, kind):
    explicit = ranks.run(train, engine, "explicit", accumulation, kind, world=world)
    attached = ranks.run(train, engine, "wrapper", accumulation, kind, world=world)
    for (found, random), (expected, expected_random) in zip(attached, explicit, strict=True):
        engines.assert_same(found, expected)
        assert torch.equal(random, expected_random)


@pytest.mark.parametrize(("world", "accumulation", "kind"), LOOPS)
def test_the_bare_module_inside_ddp_gives_the_same_weights(ranks, world, accumulation, kind):
    wrapper = ranks.run(train, "ddp", "wrapper", accumulation, kind, world=world)
    bare = ranks.run(train, "ddp", "bare", accumulation, kind, world=world)
    for found, _ in bare:
        engines.assert_same(found, bare[0][0])
        engines.assert_same(found, wrapper[0][0], **CLOSE)


class Tagger(nn.Module):
    """A net with BatchNorm that takes its labels along, as Hugging Face's models do; −100 does not count."""

    def __init__(self):
        super().__init__()
        self.net = engines.build(torch.float32)
        self.norm = nn.BatchNorm1d(engines.VOCAB)

    def forward(self, tokens, labels):
        logits = self.norm(self.net(tokens).transpose(1, 2)).transpose(1, 2) * 1.0
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def first(output):
    return output[0]


def train_tagger(engine, form, counts, chunks):
    """Two steps on batches of which rank r has counts[r] rows, and of each row r + 1 labels."""
    rank, _ = engines.place()
    model = engines.spread(engine, Tagger())
    estimator = GaussNewtonBartlett(chunks=chunks)
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=1, estimator=estimator)
    if form == "attached":
        optimizer.attach(model, logits=first, max_batch=MAX_BATCH)
    buffers = []
    for step in range(2):
        tokens, labels = (t[: counts[rank]] for t in engines.batch(step))
        labels = labels.clone()
        labels[:, rank + 1 :] = -100
        model(tokens, labels)[1].backward()
        if form == "attached":
            before = [buffer.clone() for buffer in model.buffers()]
            optimizer.step()
            buffers += [torch.equal(b, a) for b, a in zip(model.buffers(), before, strict=True)]
        else:
            refresh_explicitly(optimizer, model, tokens[:MAX_BATCH], labels[:MAX_BATCH], chunks)
            optimizer.step()
        optimizer.zero_grad()
    return engines.snapshot(model, optimizer), buffers


def refresh_explicitly(optimizer, model, tokens, labels, chunks):
    """The slices as several forwards; a rank with fewer rows than slices shows one that does not count."""
    optimizer._estimator = GaussNewtonBartlett()
    forwards = []
    for chunk in range(chunks):
        part = slice(len(tokens) * chunk // chunks, len(tokens) * (chunk + 1) // chunks)
        empty = part.start == part.stop
        part = slice(part.start, part.start + 1) if empty else part
        mask = torch.zeros_like(labels[part], dtype=torch.bool) if empty else labels[part] != -100
        forwards.append(lambda part=part, mask=mask: (model(tokens[part], labels[part])[0], mask))
    kept = [buffer.clone() for buffer in model.buffers()]
    assert optimizer.refresh_curvature(forwards)
    for buffer, before in zip(model.buffers(), kept, strict=True):
        buffer.copy_(before)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize(("counts", "chunks"), [([8, 2], 1), ([2, 1], 2), ([1, 3], 3)])
def test_labels_chunks_and_batchnorm(ranks, engine, counts, chunks):
    explicit = ranks.run(train_tagger, engine, "explicit", counts, chunks)
    attached = ranks.run(train_tagger, engine, "attached", counts, chunks)
    for (found, buffers), (expected, _) in zip(attached, explicit, strict=True):
        engines.assert_same(found, expected)
        assert buffers == [True] * 6


def train_with_an_empty_last_chunk():
    """The loss of the next batch under FSDP2 after a step, and what it is for the same weights gathered anew."""
    model = engines.wrap("fsdp", engines.build())
    optimizer = SophiaG(model.parameters(), lr=0.1, estimator=GaussNewtonBartlett(chunks=2))
    own = engines.own_rows()
    tokens, targets = (t[own] for t in engines.batch())
    optimizer.attach(model, mask=lambda part: (part == tokens[0]).all().expand(part.shape), max_batch=2)
    loss_of(model(tokens), targets).backward()
    optimizer.step()
    with torch.no_grad():
        found = loss_of(model(tokens), targets)
        model.reshard()
        return found, loss_of(model(tokens), targets)


def test_a_step_after_an_empty_last_chunk_is_seen(ranks):
    """A forward without backward leaves FSDP2's outermost parameters gathered, as they were before the step."""
    for found, expected in ranks.run(train_with_an_empty_last_chunk):
        assert torch.equal(found, expected)
