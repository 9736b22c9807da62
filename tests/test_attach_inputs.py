"""attach(): which inputs of a model it can cut along the batch, and what it says about the others."""

import collections
import dataclasses
import re
from types import MappingProxyType

import numpy
import pytest
import torch
from torch import nn

from sophia import SophiaG
from tests.models import Snapshot, assert_same, curvature, same, seeded

REMEDY = r"call optimizer\.refresh_curvature\(forward\) yourself in this loop"
Pair = collections.namedtuple("Pair", ["first", "second"])


class Model(nn.Module):
    """Takes anything, remembers it, and looks for a tensor [rows, 6] in it by `find`."""

    def __init__(self, find):
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.find = find
        self.seen = []

    def forward(self, *args, **kwargs):
        self.seen.append((args, kwargs))
        return self.layer(self.find(*args, **kwargs))


class Encoding(collections.UserDict):
    """A tokenizer's result: a mapping that is also read by attribute."""

    def __getattr__(self, name):
        return self.data[name]


def leaves(value):
    if isinstance(value, collections.abc.Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def x(rows=12):
    return torch.arange(6.0 * rows).view(rows, 6)


def attach(find, max_batch=8):
    model = seeded(lambda: Model(find))
    return model, SophiaG(model.parameters()).attach(model, max_batch=max_batch)


SLICEABLE = {
    "positional": (lambda a: a, (x(),), {}),
    "keyword": (lambda *, inputs: inputs, (), {"inputs": x()}),
    "dict": (lambda batch: batch["x"], ({"x": x(), "name": "train", "scale": 0.5},), {}),
    "list of tensors": (lambda pair: pair[0] + pair[1], ([x(), x()],), {}),
    "deep": (lambda a: a["deep"][0][1]["x"], ({"deep": [(None, {"x": x(), "y": x()[:, 0]})]},), {}),
    "named tuple": (lambda a: a.first, (Pair(x(), x()[:, :1]),), {}),
    "ordered": (lambda a: a["x"], (collections.OrderedDict(x=x()),), {}),
    "read-only": (lambda a: a["x"], (MappingProxyType({"x": x()}),), {}),
    "user's mapping": (lambda a: a.x, (Encoding(x=x(), labels_of="x"),), {}),
    "settings": (lambda a, *_, **__: a, (x(), None, 3, 0.5, "mean", True, (12, 1), [1, 2]), {"dtype": torch.float32}),
    "scalar tensor": (lambda a, temperature: a / temperature, (x(), torch.tensor(2.0)), {}),
    "integers and bools": (lambda a, tokens, pad: a, (x(), torch.arange(12), torch.ones(12, 4) > 0), {}),
    "shape": (lambda a, size: a, (x(), torch.Size([3, 4])), {}),
}


@pytest.mark.parametrize("name", SLICEABLE)
def test_inputs_are_cut_to_the_first_rows_and_keep_their_kind(name):
    find, args, kwargs = SLICEABLE[name]
    model, optimizer = attach(find)
    model(*args, **kwargs).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1
    (whole, replayed) = model.seen
    for before, after in zip(leaves(whole), leaves(replayed), strict=True):
        is_batch = isinstance(before, torch.Tensor) and before.dim() > 0
        assert same(after, before[:8] if is_batch else before)
    for before, after in zip((*args, *kwargs.values()), (*replayed[0], *replayed[1].values()), strict=True):
        assert type(after) is (dict if isinstance(before, MappingProxyType) else type(before))


@pytest.mark.parametrize(("rows", "max_batch", "used"), [(12, 8, 8), (3, 8, 3), (12, 1, 1), (12, 12, 12)])
def test_max_batch_bounds_the_rows(rows, max_batch, used):
    model, optimizer = attach(lambda a: a, max_batch)
    model(x(rows)).sum().backward()
    optimizer.step()
    assert_same(leaves(model.seen[1]), [x(rows)[:used]])


def test_slice_is_a_copy_from_before_the_forward_and_carries_no_graph():
    def forward(a):
        out = a.clone()
        with torch.no_grad():
            a.zero_()  # a model that spoils its input
        return out

    model, optimizer = attach(forward)
    twin, explicit = attach(forward)
    weight = torch.ones(6, requires_grad=True)
    batch = (x() * weight).clone()
    model(batch).sum().backward()
    batch.fill_(-1)  # and a loop that reuses its buffer
    weight.grad = None
    optimizer.step()
    explicit.detach()
    explicit.refresh_curvature(lambda: twin(x()[:8]))
    assert_same(curvature(optimizer), curvature(explicit))
    assert weight.grad is None


def test_hooks_of_the_user_see_each_input_once():
    class Doubling(nn.Linear):
        def forward(self, inputs):
            seen.append(inputs.detach().clone())
            return super().forward(inputs)

    seen = []
    model = seeded(lambda: Doubling(6, 5))
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    optimizer = SophiaG(model.parameters()).attach(model)
    model(x(4)).sum().backward()
    optimizer.step()
    assert_same(seen, [2 * x(4), 2 * x(4)])


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


REFUSED = {
    "no tensor": (("text", 3), {}, "without a tensor input that has a batch dimension"),
    "scalar tensors only": ((torch.tensor(1.0),), {}, "without a tensor input that has a batch dimension"),
    "unequal sizes": ((x(12),), {"position": torch.arange(6)}, r"position of the model has shape \(6,\) and input 0 "),
    "nested, unequal": (({"x": x()}, [x(), x(4)]), {}, r"input 1\[1\] of the model has shape \(4, 6\)"),
    "broadcast row": ((x(12),), {"position": torch.arange(6).view(1, 6)}, r"position of the model has shape \(1, 6\)"),
    "dataclass": ((Batch(x()),), {}, "input 0 of the model is a Batch"),
    "array": ((x(),), {"lengths": numpy.arange(12)}, "lengths of the model is a ndarray"),
    "range": ((x(), range(12)), {}, "input 1 of the model is a range"),
    "opaque inside": ((x(),), {"cache": {"past": object()}}, r"cache\['past'\] of the model is a object"),
    "list of lengths": ((x(),), {"lengths": list(range(12))}, "lengths of the model is a list of 12 items"),
    "captions": ((x(), ["a caption"] * 12), {}, "input 1 of the model is a list of 12 items"),
    "sparse": ((x().to_sparse(),), {}, "layout torch.sparse_coo"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_cannot_be_cut_raise_with_the_remedy_and_change_nothing(name):
    args, kwargs, message = REFUSED[name]
    model, optimizer = attach(lambda *_, **__: x())
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{message}.*{REMEDY}"):
        model(*args, **kwargs)
    before.assert_unchanged()
    model.eval()
    model(*args, **kwargs)  # evaluation is not our business
    optimizer.detach()
    model.train()
    model(*args, **kwargs)


def test_inputs_that_cannot_be_cut_are_no_matter_while_no_refresh_is_due():
    model, optimizer = attach(lambda *_: x())
    model(x()).sum().backward()
    optimizer.step()
    model(x(), object()).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["clock"] == 2


def test_list_of_rows_is_refused_at_any_max_batch():
    model, _ = attach(lambda a, lengths: a, max_batch=12)
    with pytest.raises(ValueError, match=re.escape("a list of 12 items")):
        model(x(), [1] * 12)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(12, 2, dtype=torch.int64), r"labels of shape \(8, 2\) .* predictions of shape \(8,\) count"),
        (torch.zeros(12, 5, dtype=torch.int64), r"labels of shape \(8, 5\)"),
    ],
)
def test_labels_that_do_not_match_the_predictions_ask_for_a_mask(labels, message):
    model, optimizer = attach(lambda a, labels: a)
    model(x(), labels=labels)
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{message}.*attach\(model, mask=\.\.\.\)"):
        optimizer.step()
    before.assert_unchanged()


def test_labels_that_are_no_class_indices_mask_nothing():
    model, optimizer = attach(lambda a, labels: a)
    model(x(), labels=torch.randn(12, 5)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1
