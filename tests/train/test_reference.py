"""The reference curves: this machine reproduces them, and what is wrong does not pass."""

import hashlib
import json
import signal
from dataclasses import replace

import pytest

from sophia import cli, reference
from sophia.step import Stepper


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return reference.write_data(tmp_path_factory.mktemp("reference") / "data")


def test_the_text_is_the_same_everywhere():
    digest = hashlib.sha256("\n".join(reference.generated_documents()).encode()).hexdigest()
    assert digest == "8e3b7f2f782a188d5c13f8e06c7c79592c72a85b6e33bc4213566ed7c2f6b45b"


@pytest.mark.parametrize("name", reference.OPTIMIZERS)
def test_golden_losses(name, data, tmp_path):
    found = reference.measure(name, data, tmp_path / "run")
    shipped = reference.expected()["losses"][name]
    assert len(shipped) == reference.STEPS
    assert shipped[0] - shipped[-1] > 2
    assert reference.compare(shipped, found)["largest"] <= reference.TOLERANCE


FIRST = 13  # steps, in which the curvature is estimated twice


def stopped_early(monkeypatch, **changes):
    """Reference runs have other settings of the optimizer, and are stopped by a signal."""
    original, settings = Stepper.gradients, reference.settings

    def gradients(self, inputs, targets, *, index):
        if index == FIRST - 1:
            signals.received = signal.SIGTERM
        return original(self, inputs, targets, index=index)

    def changed(*args):
        chosen = settings(*args)
        return replace(chosen, optimizer=replace(chosen.optimizer, **changes))

    signals = reference.Signals()
    monkeypatch.setattr(reference, "Signals", lambda: signals)
    monkeypatch.setattr(reference, "settings", changed)
    monkeypatch.setattr(Stepper, "gradients", gradients)


def deviation(found):
    assert len(found) == FIRST
    return reference.compare(reference.expected()["losses"]["sophia-g"][:FIRST], found)["largest"]


def test_the_other_form_of_curvature_noise_does_not_pass(monkeypatch, data, tmp_path):
    """A hundredth of a nat in few steps: a hundred times the tolerance."""
    stopped_early(monkeypatch, curvature_noise="signs")
    assert deviation(reference.measure("sophia-g", data, tmp_path / "run")) > 1e-2


def test_another_order_of_sums_passes(monkeypatch, data, tmp_path):
    stopped_early(monkeypatch)
    assert deviation(reference.measure("sophia-g", data, tmp_path / "run", micro_batch=3)) < 1e-5


def test_what_is_compared():
    same = reference.compare([3.0, 2.0, 1.0], [3.0, 2.0, 1.0])
    assert (same["largest"], same["first_different_step"]) == (0.0, None)
    off = reference.compare([3.0, 2.0, 1.0], [3.0, 2.5, 1.25])
    assert (off["largest"], off["at_step"], off["first_different_step"]) == (0.5, 2, 2)
    assert reference.compare([3.0], [None])["largest"] == float("inf")


def shifted(by):
    def measure(name, data, out, **changes):
        return [loss + by * step for step, loss in enumerate(reference.expected()["losses"][name])]

    return measure


def test_the_command_says_bit_for_bit(monkeypatch, capsys):
    monkeypatch.setattr(reference, "measure", shifted(0.0))
    assert cli.main(["train", "--check-reference"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_the_command_says_how_far_off(monkeypatch, capsys):
    monkeypatch.setattr(reference, "measure", shifted(1e-7))
    assert cli.main(["train", "--check-reference", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["optimizers"]["adamw"]
    assert shown["first_different_step"] == 2
    assert shown["largest"] == pytest.approx(39e-7)


def test_the_command_fails_beyond_the_tolerance(monkeypatch, capsys):
    monkeypatch.setattr(reference, "measure", shifted(1e-4))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--check-reference"])
    assert ended.value.code == 1
    assert "does not train as" in capsys.readouterr().out
