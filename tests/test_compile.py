"""torch.compile of the model: the same curvature, and attach() through each of its forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from sophia.curvature import Hutchinson
from tests.models import Snapshot, Tagger, assert_same, curvature, examples, same, seeded, sentences

torch_dynamo = pytest.importorskip("torch._dynamo")
BACKEND = "aot_eager"  # the whole of the compiler but for code generation, which costs half a minute


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch_dynamo.reset()
    torch_dynamo.utils.counters.clear()
    yield
    torch_dynamo.reset()


def build():
    # No dropout: compiled code draws other masks than eager code.
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 5))


def graphs():
    return torch_dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model, **options):
    return torch.compile(model, backend=BACKEND, **options)


def test_gauss_newton_bartlett_is_equal_to_eager():
    model, (x, _) = seeded(build), examples()
    call = compiled(model)
    one, other = (SophiaG(model.parameters()) for _ in range(2))
    assert one.refresh_curvature(lambda: call(x))
    assert graphs() == 1
    assert other.refresh_curvature(lambda: model(x))
    torch.testing.assert_close(curvature(one), curvature(other), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_hutchinson_falls_back_to_finite_differences(noise):
    model, (x, y) = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))), examples()
    call = compiled(model)

    def loss(function):
        return lambda: F.cross_entropy(function(x), y)

    auto = SophiaH(model.parameters(), estimator=Hutchinson(noise=noise))
    values = [p.detach().clone() for p in model.parameters()]
    assert auto.refresh_curvature(loss(call))
    assert graphs() >= 1
    assert_same(model.parameters(), values)
    exact = SophiaH(model.parameters(), estimator=Hutchinson(noise=noise, product="double_backward"))
    assert exact.refresh_curvature(loss(model))
    for h, reference in zip(curvature(auto), curvature(exact), strict=True):
        assert float((h - reference).norm()) < 1e-3 * float(reference.norm())
    with pytest.raises(RuntimeError, match=r'no second derivative .*use product="finite_difference" or "auto"'):
        SophiaH(model.parameters(), estimator=Hutchinson(product="double_backward")).refresh_curvature(loss(call))


def test_a_second_pass_through_a_compiled_model_is_not_even_tried(monkeypatch):
    # With inductor's donated buffers the first pass of the two raises already, in words of its own.
    model, (x, y) = seeded(build), examples()
    call = compiled(model)
    F.cross_entropy(call(x), y).backward()  # the compiler uses autograd.grad itself
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("double backward was tried"))
    assert SophiaH(model.parameters()).refresh_curvature(lambda: F.cross_entropy(call(x), y))


def test_hutchinson_runs_an_eager_model_by_double_backward():
    calls = []
    model, (x, y) = seeded(lambda: nn.Linear(6, 5)), examples()
    optimizer = SophiaH(model.parameters())
    optimizer.refresh_curvature(lambda: (calls.append(1), F.cross_entropy(model(x), y))[1])
    assert len(calls) == 1  # differences would take two


def form_original_attached_before(model, optimizer):
    optimizer.attach(model)
    return compiled(model)


def form_original_attached_after(model, optimizer):
    call = compiled(model)
    optimizer.attach(model)
    return call


def form_wrapper(model, optimizer):
    call = compiled(model)
    optimizer.attach(call)
    return call


def form_wrapper_of_one_graph(model, optimizer):
    call = compiled(model, fullgraph=True)
    optimizer.attach(call)
    return call


def form_compiled_in_place(model, optimizer):
    model.compile(backend=BACKEND)
    optimizer.attach(model)
    return model


def form_attached_then_compiled_in_place(model, optimizer):
    optimizer.attach(model)
    model.compile(backend=BACKEND)
    return model


FORMS = [
    form_original_attached_before,
    form_original_attached_after,
    form_wrapper,
    form_wrapper_of_one_graph,
    form_compiled_in_place,
    form_attached_then_compiled_in_place,
]


def train(call, optimizer, steps=5):
    for step in range(steps):
        x, y = examples(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_attach_to_every_form_trains_as_eager_does(form):
    def pair():
        model = seeded(build)
        return model, SophiaG(model.parameters(), lr=1e-2, gamma=1.0, curvature_interval=2)

    model, optimizer = pair()
    train(model, optimizer.attach(model))
    twin, other = pair()
    train(form(twin, other), other)
    assert graphs() >= 1  # it was compiled indeed
    assert other.param_groups[0]["accepted_refreshes"] == 3
    assert int(twin[1].num_batches_tracked) == 5
    torch.testing.assert_close(dict(twin.named_parameters()), dict(model.named_parameters()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curvature(other), curvature(optimizer), rtol=1e-3, atol=1e-7)


def test_wrapper_may_be_attached_when_its_code_exists_already():
    model = seeded(build)
    call = compiled(model)
    x, y = examples()
    call(x)
    optimizer = SophiaG(model.parameters()).attach(call)
    F.cross_entropy(call(x), y).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1


def test_original_module_whose_code_exists_already_is_never_missed_silently():
    # Compiled code does not look for new hooks of the module inside it.
    model = seeded(build)
    call = compiled(model)
    x, y = examples()
    call(x)
    optimizer = SophiaG(model.parameters()).attach(model)
    F.cross_entropy(call(x), y).backward()
    with pytest.raises(RuntimeError, match=r"the module that the loop calls .*the compiled module"):
        optimizer.step()


def test_one_graph_of_the_original_module_says_what_to_attach():
    model = seeded(build)
    call = compiled(model, fullgraph=True)
    optimizer = SophiaG(model.parameters()).attach(model)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"attach\(\) the module that torch\.compile returned"):
        call(examples()[0])
    before.assert_unchanged()


def test_labels_of_a_compiled_model_are_found():
    tokens, labels = sentences()
    model, twin = seeded(Tagger), seeded(Tagger)
    call = compiled(model)
    optimizer = SophiaG(model.parameters()).attach(call, max_batch=4)
    call(tokens, labels).loss.backward()
    optimizer.step()
    explicit = SophiaG(twin.parameters())
    explicit.refresh_curvature(lambda: (twin(tokens[:4]).logits, labels[:4] != -100))
    torch.testing.assert_close(curvature(optimizer), curvature(explicit), rtol=1e-4, atol=1e-8)


def test_explicit_loop_under_autocast_and_compile():
    model = seeded(build)
    call = compiled(model)
    optimizer = SophiaG(model.parameters(), lr=2e-2, curvature_interval=3)
    x, y = examples()
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.refresh_curvature(lambda: call(x[:8]))
            loss = F.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_stream_of_a_compiled_loop_is_left_alone():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 5)))
    call = compiled(model)
    optimizer = SophiaG(model.parameters())
    state = torch.get_rng_state()
    assert optimizer.refresh_curvature(lambda: call(examples()[0]))
    assert same(torch.get_rng_state(), state)
