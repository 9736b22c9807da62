"""SophiaCallback: the LightningModule stays AdamW's, and the weights are those of the plain loop."""

import contextlib
import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from tests.models import TinyForCausalLM, assert_same, curvature, same, seeded

L = pytest.importorskip("lightning.pytorch", reason="needs Lightning (the extra `lightning`)")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

from sophia.integrations.lightning import SophiaCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

VOCAB, ROWS, LENGTH = 50, 12, 6
SETTINGS = {"lr": 1e-2, "curvature_interval": 3}
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def build():
    """Dropout makes every number that is drawn matter."""
    return nn.Sequential(
        nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, VOCAB, bias=False)
    )


class Batches:
    """An iterable of batches; Lightning takes a list for several loaders."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(0, VOCAB, (count, 2, ROWS, LENGTH), generator=generator)
    return Batches([(tokens, targets) for tokens, targets in both])


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Module(L.LightningModule):
    """A LightningModule as its users write it; `call` is how training_step calls the model."""

    def __init__(self, call="self.net", kind=SophiaG):
        super().__init__()
        self.net = seeded(build)
        self.call, self.kind = call, kind

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, index):
        torch.manual_seed(index)
        tokens, targets = batch
        logits = self(tokens) if self.call == "self" else self.net(tokens)
        return loss_of(logits, targets)

    def validation_step(self, batch, index):
        self(batch[0])

    def configure_optimizers(self):
        return self.kind(self.parameters(), **SETTINGS)


def trainer(*callbacks, **settings):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"accelerator": "cpu", "max_epochs": 1, **dict.fromkeys(quiet, False), **settings}
    return L.Trainer(callbacks=list(callbacks), **settings)


def fitted(module, data, callback=None, **settings):
    """The module's weights and its optimizer after training."""
    kept = trainer(callback or SophiaCallback(), **settings)
    kept.fit(module, data)
    return kept.optimizers[0]


def plain(data, *, accumulate=1, clip=None, precision="32-true", scaler=None):
    """The same training as a loop, with the refresh written out."""
    net = seeded(build)
    optimizer = SophiaG(net.parameters(), **SETTINGS)

    def autocast():
        dtype = DTYPES.get(precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    for index, (tokens, targets) in enumerate(data):
        torch.manual_seed(index)
        with autocast():
            loss = loss_of(net(tokens), targets) / accumulate
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (index + 1) % accumulate:
            continue
        with autocast():
            optimizer.refresh_curvature(lambda tokens=tokens: net(tokens[:8]))
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return net, optimizer


# ---- the same weights


@pytest.mark.parametrize(
    ("call", "accumulate", "clip", "precision"),
    [
        ("self.net", 1, None, "32-true"),
        ("self", 3, 0.1, "32-true"),
        ("self", 1, None, "bf16-mixed"),
        ("self.net", 3, 0.1, "bf16-mixed"),
    ],
)
def test_is_equal_to_the_plain_loop(call, accumulate, clip, precision):
    data = batches(9 if accumulate == 1 else 12)
    module = Module(call)
    optimizer = fitted(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=clip, precision=precision)
    net, explicit = plain(data, accumulate=accumulate, clip=clip, precision=precision)
    steps = len(data) // accumulate  # the optimizer's own, not batches
    assert optimizer.param_groups[0]["clock"] == steps
    assert optimizer.refreshes == explicit.refreshes == -(-steps // 3)
    assert_same(module.net.parameters(), net.parameters())
    assert_same(curvature(optimizer), curvature(explicit))
    assert not any(same(p, q) for p, q in zip(net.parameters(), seeded(build).parameters(), strict=True))


def test_is_equal_to_the_plain_loop_under_a_loss_scaler():
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    data, module = batches(6), Module()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler())
    optimizer = fitted(module, data, plugins=[plugin], gradient_clip_val=0.1)
    net, explicit = plain(data, clip=0.1, precision="16-mixed", scaler=scaler())
    assert optimizer.refreshes == explicit.refreshes == 2
    assert_same(module.net.parameters(), net.parameters())


def test_validation_is_ignored_before_and_during_training():
    data, module = batches(8), Module("self")
    other = batches(2, seed=9)
    kept = trainer(SophiaCallback(), num_sanity_val_steps=2, val_check_interval=1)
    kept.fit(module, data, other)
    net, _ = plain(data)
    assert_same(module.net.parameters(), net.parameters())


def test_resumed_from_a_checkpoint_is_equal_to_uninterrupted(tmp_path):
    data = batches(5)  # the second epoch begins between two refreshes
    whole, half, rest = Module(), Module(), Module("self")
    fitted(whole, data, max_epochs=2)
    first = trainer(SophiaCallback())
    first.fit(half, data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    with torch.no_grad():
        for p in rest.parameters():
            p.zero_()  # all must come from the checkpoint
    second = trainer(SophiaCallback(), max_epochs=2)
    second.fit(rest, data, ckpt_path=tmp_path / "one.ckpt")
    assert second.optimizers[0].param_groups[0]["clock"] == 10
    assert_same(rest.parameters(), whole.parameters())


def test_learning_rate_schedules_and_warm_up_from_zero():
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Scheduled()
    optimizer = fitted(module, batches(4))
    assert optimizer.param_groups[0]["clock"] == 4
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    assert optimizer.refreshes == 2


# ---- which module


def expected(net, tokens, counts=None):
    """The curvature that one refresh gives."""
    optimizer = SophiaG(net.parameters(), **SETTINGS)
    optimizer.refresh_curvature(lambda: net(tokens) if counts is None else (net(tokens).logits, counts))
    return curvature(optimizer)


class InParts(Module):
    """training_step calls no module that holds all."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.body, self.head = self.net[:4], self.net[4]
        del self.net

    def training_step(self, batch, index):
        return loss_of(self.head(self.body(batch[0])), batch[1])


def test_model_called_in_parts_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"called none of self, .*SophiaCallback\(model="):
        trainer(SophiaCallback()).fit(InParts(), batches(2))


def test_named_model_is_the_one_attached():
    module, data = InParts(), batches(1)
    twin = copy.deepcopy(module)
    optimizer = fitted(module, data, SophiaCallback(model="body", logits=module.head, max_batch=4))
    explicit = SophiaG(twin.parameters(), **SETTINGS)
    explicit.refresh_curvature(lambda: twin.head(twin.body(data.items[0][0][:4])))
    assert_same(curvature(optimizer), curvature(explicit))


def test_causal_model_is_attached_itself_so_that_its_labels_are_known_to_be_one_ahead():
    class Causal(Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(TinyForCausalLM)

        def forward(self, tokens, labels):
            return self.net(tokens, labels=labels)

        def training_step(self, batch, index):
            return self(*batch).loss

    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[:, :3] = -100
    module, twin = Causal(), seeded(TinyForCausalLM)
    optimizer = fitted(module, Batches([(tokens, labels)]))
    counts = torch.tensor([False, False, True, True, True, False]).expand(4, 6)
    assert_same(curvature(optimizer), expected(twin, tokens, counts))


class WithTeacher(Module):
    """A forward without gradients goes before the one that counts."""

    def training_step(self, batch, index):
        with torch.no_grad():
            self(batch[1])
        return super().training_step(batch, index)


def test_forward_without_gradients_is_not_the_one():
    data, module = batches(4), WithTeacher("self.net")
    optimizer = fitted(module, data)
    net, _ = plain(data)
    assert optimizer.refreshes == 2
    assert_same(module.net.parameters(), net.parameters())


def test_compiled_model_is_attached_outside_of_the_compiler():
    module, data = WithTeacher(), batches(4)
    module.net = torch.compile(module.net, backend="eager", fullgraph=True)  # which no hook may break
    optimizer = fitted(module, data)
    net, explicit = plain(data)
    assert optimizer.refreshes == 2
    assert_same(module.net.parameters(), net.parameters())
    assert_same(curvature(optimizer), curvature(explicit))


def test_hessian_of_the_loss_that_the_model_returns():
    class WithLoss(Module):
        def forward(self, tokens, targets):
            return loss_of(self.net(tokens), targets)

        def training_step(self, batch, index):
            return self(*batch)

    optimizer = fitted(WithLoss(kind=SophiaH), batches(4))
    assert optimizer.refreshes == 2


def test_module_may_bring_the_callback():
    class Bringing(Module):
        def configure_callbacks(self):
            return [SophiaCallback()]

    data, module = batches(4), Bringing()
    trainer().fit(module, data)
    net, _ = plain(data)
    assert_same(module.net.parameters(), net.parameters())


def test_attached_where_it_is_built_it_needs_no_callback_which_the_tuner_would_put_aside(tmp_path):
    class Attached(Module):
        lr = 1e-3

        def configure_optimizers(self):
            return super().configure_optimizers().attach(self.net)

    data, module = batches(9), Attached()
    kept = trainer(default_root_dir=tmp_path)
    found = Tuner(kept).lr_find(module, data, num_training=4, update_attr=False, early_stop_threshold=None)
    assert len(found.results["loss"]) == 4
    kept.fit(module, data)
    net, _ = plain(data)
    assert kept.optimizers[0].refreshes == 3
    assert_same(module.net.parameters(), net.parameters())


# ---- several optimizers


class Two(Module):
    """Lightning wants manual optimization where there are two."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(3, 1)

    def training_step(self, batch, index):
        torch.manual_seed(index)
        first, second = self.optimizers()
        for optimizer, loss in ((first, self.other(torch.ones(3)).sum()), (second, loss_of(self(batch[0]), batch[1]))):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.other.parameters(), lr=0.1), SophiaG(self.net.parameters(), **SETTINGS)]


def test_several_optimizers_are_refused_unless_one_is_named():
    with pytest.raises(ValueError, match=r"2 optimizers \(0: SGD, 1: SophiaG\).*SophiaCallback\(optimizer=0\)"):
        trainer(SophiaCallback()).fit(Two(), batches(1))
    with pytest.raises(ValueError, match=r"optimizer=2\) is none of"):
        trainer(SophiaCallback(optimizer=2)).fit(Two(), batches(1))
    with pytest.raises(ValueError, match="nothing to refresh: the optimizer is SGD"):
        trainer(SophiaCallback(optimizer=0)).fit(Two(), batches(1))


def test_named_optimizer_trains_as_in_the_plain_loop():
    module, data = Two(), batches(4)
    trainer(SophiaCallback(optimizer=1)).fit(module, data)
    net, _ = plain(data)
    assert_same(module.net.parameters(), net.parameters())


# ---- bad input


def test_forgotten_callback_is_a_clear_error():
    with pytest.raises(RuntimeError, match="sign-momentum"):
        trainer().fit(Module(), batches(2))


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_cannot_work_are_refused_at_once(strategy):
    kept = trainer(SophiaCallback())
    kept.strategy.__class__ = type(strategy.__name__, (type(kept.strategy),), {})
    with pytest.raises(ValueError, match=f"does not support {strategy.__name__}"):
        kept.fit(Module(), batches(1))


def test_other_mistakes_are_told_when_fit_begins():
    class Attached(Module):
        def configure_optimizers(self):
            return super().configure_optimizers().attach(self.net)

    class Elsewhere(Module):
        def configure_optimizers(self):
            return SophiaG(seeded(build).parameters())

    class Adam(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(ValueError, match=r"leave \.attach"):
        trainer(SophiaCallback()).fit(Attached(), batches(1))
    with pytest.raises(ValueError, match="does not hold"):
        trainer(SophiaCallback()).fit(Elsewhere(), batches(1))
    with pytest.raises(ValueError, match="the optimizer is AdamW"):
        trainer(SophiaCallback()).fit(Adam(), batches(1))
    with pytest.raises(ValueError, match=r"model='nett'\): the LightningModule has no such part, but has 'net'"):
        trainer(SophiaCallback("nett")).fit(Module(), batches(1))
    with pytest.raises(ValueError, match="max_batch=0"):
        trainer(SophiaCallback(max_batch=0)).fit(Module(), batches(1))


def hooks(module):
    return [hook for part in module.modules() for hook in part._forward_pre_hooks.values()]


def test_no_hook_stays_behind():
    class Failing(Module):
        def training_step(self, batch, index):
            if index == 3:
                raise KeyError("out of luck")
            return super().training_step(batch, index)

    module, failing = Module(), Failing()
    fitted(module, batches(4))
    with pytest.raises(KeyError, match="out of luck"):
        fitted(failing, batches(4))
    assert hooks(module) == hooks(failing) == []


def test_works_with_the_package_of_the_other_name():
    other = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = seeded(build)

        def training_step(self, batch, index):
            torch.manual_seed(index)
            return loss_of(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return SophiaG(self.parameters(), **SETTINGS)

    data, module = batches(4), Other()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    other.Trainer(accelerator="cpu", max_epochs=1, callbacks=[SophiaCallback()], **quiet).fit(module, data)
    net, _ = plain(data)
    assert_same(module.net.parameters(), net.parameters())


def test_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "sophia.integrations.lightning")
    for name in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'sophia-lm\[lightning\]'"):
        import sophia.integrations.lightning  # noqa: F401


# ---- the documentation


PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "lightning.md"


def test_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"build_net": build, "loader": batches(3), "F": F, "PADDING": 0}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), scope)
        assert scope["trainer"].optimizers[0].refreshes == 1
        assert scope["trainer"].optimizers[0].param_groups[0]["clock"] == 3
    assert 0 < float(scope["trainer"].logged_metrics["clip_fraction"]) <= 1
