"""attach(): how long it lives, what it leaves behind, and what it says when a model does not fit."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from tests.models import Classifier, Output, Snapshot, assert_same, examples, same, seeded


def unattached(model):
    return SophiaG(model.parameters(), lr=1e-2, curvature_interval=3)


def attached(model):
    return unattached(model).attach(model, max_batch=5)


def test_step_before_any_training_forward_raises_and_changes_nothing():
    model = seeded(Classifier)
    optimizer = attached(model)
    model.eval()
    F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no training forward of the attached model was seen"):
        optimizer.step()
    before.assert_unchanged()


def copies(thing):
    yield copy.deepcopy(thing)
    yield pickle.loads(pickle.dumps(thing))
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copies_of_the_optimizer_are_unattached():
    model = seeded(Classifier)
    optimizer = attached(model)
    for other in copies(optimizer):
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        model(examples()[0])
        with pytest.raises(RuntimeError, match=r"optimizer\.refresh_curvature"):
            other.step()


def test_copies_of_the_model_are_inert_and_can_be_attached_anew():
    model = seeded(Classifier)
    optimizer = attached(model)
    x, y = examples()
    for twin in copies(model):
        F.cross_entropy(twin(x), y).backward()
        with pytest.raises(RuntimeError, match="no training forward"):
            optimizer.step()
        for again in copies(twin):
            assert same(again(x).mean().isfinite(), torch.tensor(True))
        other = attached(twin)
        twin(x)
        other.step()
        assert twin.calls == 3 + model.calls
        assert other.param_groups[0]["accepted_refreshes"] == 1
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert model.calls == 2


def test_detach_undoes_attach():
    model = seeded(Classifier)
    optimizer = attached(model)
    with pytest.raises(RuntimeError, match=r"attached to a model already: call detach\(\) first"):
        optimizer.attach(model)
    model(examples()[0])
    optimizer.detach()
    assert not model._forward_pre_hooks
    F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.refresh_curvature"):
        optimizer.step()
    optimizer.detach()
    optimizer.attach(model)
    model(examples()[0])
    optimizer.step()
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1


def test_model_outlives_its_optimizer():
    model = seeded(Classifier)
    gone = weakref.ref(attached(model))
    gc.collect()
    assert gone() is None
    assert model(examples()[0]).shape == (12, 5)


def test_keeps_no_inputs_after_the_refresh_and_runs_the_model_again_only_for_one():
    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    def inputs():
        return [
            thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.shape[1:] == (4, 6)
        ]

    calls = []
    model = seeded(lambda: Counting(6, 5))
    optimizer = unattached(model).attach(model)
    gc.collect()
    gc.disable()  # by reference counts alone: no cycle waits for the collector
    try:
        for _ in range(7):
            model(torch.randn(12, 4, 6)).sum().backward()
            assert len(inputs()) == (1 if optimizer.curvature_due else 0)
            optimizer.step()
            optimizer.zero_grad()
            assert inputs() == []
    finally:
        gc.enable()
    assert len(calls) == 7 + 3


def test_buffers_that_a_forward_replaces_are_put_back_too():
    class Averaging(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x):
            out = super().forward(x)
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
            return out

    model = seeded(Averaging)
    optimizer = unattached(model).attach(model)
    model(examples()[0]).sum().backward()
    owned, value = model.mean, model.mean.clone()
    optimizer.step()
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1
    assert model.mean is owned
    assert same(model.mean, value)


def test_graph_held_over_the_step_stays_valid_though_buffers_are_restored():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)
            self.register_buffer("keep", torch.ones(5))

        def forward(self, x):
            return super().forward(x) * self.keep

    model = seeded(Masked)
    optimizer = unattached(model).attach(model)
    z = torch.randn(4, 5, requires_grad=True)
    held = (z * model.keep).sum()  # saves the buffer for its backward pass
    model(examples()[0]).sum().backward()
    optimizer.step()
    held.backward()
    assert torch.equal(z.grad, torch.ones(4, 5))


def test_error_in_the_refresh_leaves_all_as_it_was_and_the_loop_can_go_on():
    def logits(output):
        if broken:
            raise KeyError("the user's own")
        return output

    broken = True
    model = seeded(Classifier)
    optimizer = unattached(model).attach(model, logits=logits)
    x, y = examples()
    F.cross_entropy(model(x), y).backward()
    before, buffers = Snapshot(optimizer), [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(KeyError, match="the user's own"):
        optimizer.step()
    before.assert_unchanged()
    assert_same(model.buffers(), buffers)
    broken = False
    model(x)
    optimizer.step()
    assert optimizer.param_groups[0]["clock"] == 1


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        (SophiaG, lambda z: (z, z.sum()), r"a tuple of \(a tensor of shape \(8, 5\).*attach\(model, logits=\.\.\.\)"),
        (SophiaG, lambda z: {"logits": z}, r"a dict, not logits.*attach\(model, logits=\.\.\.\)"),
        (SophiaG, lambda z: z.sum(), "returned a scalar.*return model"),
        (SophiaH, lambda z: z, r"a tensor of shape \(8, 5\), but Hutchinson needs the scalar mean loss"),
        (SophiaH, Output, r"a NoneType, but Hutchinson.*attach\(model, logits=\.\.\.\)"),
    ],
)
def test_output_that_does_not_fit_says_what_to_pass(kind, output, message):
    class Odd(nn.Linear):
        def forward(self, x):
            return output(super().forward(x))

    model = seeded(lambda: Odd(6, 5))
    optimizer = kind(model.parameters()).attach(model)
    model(examples()[0])
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    before.assert_unchanged()
