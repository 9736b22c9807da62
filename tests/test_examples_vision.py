"""The examples on real images: they run, their race is fair, and they claim no more than their intervals allow."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from tests.models import assert_same
from tests.pictures import is_picture

pytest.importorskip("sklearn", reason="the images come with scikit-learn: the extra examples")

ROOT = Path(__file__).parents[1]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vision():
    return example("vision_digits")


@pytest.fixture(scope="module")
def masked():
    return example("masked_pixels")


def quick(module, out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--quick", "--out", str(out)])
    module.main()
    return capsys.readouterr().out


def test_vision_digits_runs(vision, tmp_path, monkeypatch, capsys):
    printed = quick(vision, tmp_path / "out", monkeypatch, capsys)
    assert is_picture(tmp_path / "out" / "vision-digits.png")
    results = json.loads((tmp_path / "out" / "vision-digits.json").read_text())
    assert results["verdict"] in printed
    rows = {(row["model"], row["optimizer"]): row for row in results["rows"]}
    assert len(rows) == len(vision.MODELS) * len(vision.SEARCHES) == 6
    for (model, _), row in rows.items():
        assert len(row["trials"]) == vision.QUICK.trials
        assert len({json.dumps(one) for one in row["trials"]}) == vision.QUICK.trials
        best = min(row["trials"], key=lambda one: one["loss"])
        assert {name: best[name] for name in row["best"]} == row["best"]
        theirs = rows[model, "AdamW"]["runs"]
        assert [point[0] for point in row["runs"][0]] == [2, 4]
        gaps = [one[-1][2] - other[-1][2] for one, other in zip(row["runs"], theirs, strict=True)]
        found = row["accuracy_minus_adamw"]
        assert found["value"] == pytest.approx(sum(gaps) / 2)
        # Student's t of two values: 12.706 times half of their distance.
        assert found["high"] - found["value"] == pytest.approx(12.706 * abs(gaps[0] - gaps[1]) / 2, abs=1e-4)
    losses = [row["loss"]["value"] for row in rows.values()]
    assert len(set(losses)) == 6  # six runs that learned, each in its own way
    assert min(losses) < math.log(10)


def test_masked_pixels_runs(masked, tmp_path, monkeypatch, capsys):
    printed = quick(masked, tmp_path / "out", monkeypatch, capsys)
    assert is_picture(tmp_path / "out" / "masked-pixels.png")
    results = json.loads((tmp_path / "out" / "masked-pixels.json").read_text())
    assert results["verdict"] in printed
    assert {name: len(its) for name, its in results["trials"].items()} == {"AdamW": 3, "Sophia-G": 3}
    for curves in results["curves"].values():
        assert all(curve[-1][1] < curve[0][1] for curve in curves)


@pytest.mark.parametrize(("name", "kind"), [("Sophia-G", SophiaG), ("Sophia-H", SophiaH)])
def test_a_refresh_leaves_the_statistics_of_batchnorm(vision, name, kind, monkeypatch):
    """And they are those of the training batches: one update a step."""
    models, accepted, refresh = [], [], kind.refresh_curvature

    def build():
        models.append(vision.cnn())
        return models[-1]

    def watched(optimizer, forward):
        before = [buffer.clone() for buffer in models[-1].buffers()]
        accepted.append(refresh(optimizer, forward))
        assert_same(models[-1].buffers(), before)

    monkeypatch.setitem(vision.MODELS, "CNN with BatchNorm", build)
    monkeypatch.setattr(kind, "refresh_curvature", watched)
    race = vision.QUICK._replace(steps=12, batch=8)
    _, lr, others, _ = vision.SEARCHES[name]
    vision.train(race, "CNN with BatchNorm", name, vision.settings(lr=lr, **others), 1, "validation")
    assert [step for step, done in enumerate(accepted) if done] == [0, 10]
    counts = {int(value) for key, value in models[-1].named_buffers() if key.endswith("num_batches_tracked")}
    assert counts == {race.steps}


def test_the_refresh_sees_the_training_forward(vision):
    model, images = vision.cnn(), vision.DIGITS["train"][0][:8]
    assert torch.equal(vision.without_memory(model, images), model(images))
    assert not torch.equal(vision.without_memory(model, images), model.eval()(images))


def test_one_seed_is_one_start_and_one_order_of_batches(vision, monkeypatch):
    seen = {}

    def build(name, model, known, seed):
        own = seen[name] = [nn.utils.parameters_to_vector(model.parameters()).detach().clone()]
        model.register_forward_pre_hook(lambda _, args: own.append(args[0]) if model.training else None)
        return made(name, model, known, seed)

    made = vision.build
    monkeypatch.setattr(vision, "build", build)
    for name, (_, lr, others, _) in vision.SEARCHES.items():
        vision.train(vision.QUICK, "CNN with BatchNorm", name, vision.settings(lr=lr, **others), 1, "validation")
    adamw = seen["AdamW"]
    assert len(adamw) == 1 + vision.QUICK.steps
    for name in ("Sophia-G", "Sophia-H"):
        weights, refreshed, *batches = seen[name]
        assert_same([weights, refreshed, *batches], [adamw[0], adamw[1], *adamw[1:]])


def test_the_code_of_the_page():
    text = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    images = torch.rand(12, 6, 1, 8, 8)
    for code in blocks:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))
        loader = [(batch, torch.randint(10, (6,))) for batch in images]
        if "likelihood" in code:
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Unflatten(1, (8, 8)))
            hidden = torch.rand(12, 6, 8, 8) < 0.5
            pairs = zip(images.squeeze(2), hidden, strict=True)
            loader = [(pixels * ~mask, pixels, mask) for pixels, mask in pairs]
        scope = {"model": model, "loader": loader, "F": F}
        exec(compile(code, "vision.md", "exec"), scope)
        assert scope["optimizer"].refreshes == 2
        if "likelihood" not in code:
            assert int(model[1].num_batches_tracked) == 12


def test_the_page_says_what_was_measured(vision):
    """Its figures are those of the committed runs, and of what the example makes of them today."""
    page = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    committed = json.loads((ROOT / "benchmarks" / "results" / "vision-digits.json").read_text())
    assert committed["settings"] == json.loads(json.dumps(vision.FULL._asdict()))
    contests = {}
    for row in committed["rows"]:
        tried = ((one, one.pop("why"), one.pop("loss")) for one in row["trials"])
        candidates = [SimpleNamespace(settings=settings, why=why, loss=loss) for settings, why, loss in tried]
        found = SimpleNamespace(candidates=candidates, best=row["best"], edges=row["edges"])
        contests[row["model"], row["optimizer"]] = found, row["runs"]
    results = vision.judge(vision.FULL, contests)
    assert results["verdict"] == committed["verdict"]
    for row in results["rows"]:
        model = row["model"].removesuffix(" with BatchNorm")
        cells = [f"{row['best']['lr']:g}"]
        gaps = [(row["accuracy_minus_adamw"], 100, 1)] if row["optimizer"] != "AdamW" else []
        for estimate, unit, digits in [(row["accuracy"], 100, 1), (row["loss"], 1, 3), *gaps]:
            numbers = (f"{unit * estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
            cells.append("{} ({} to {})".format(*numbers).replace("-", "−"))
        line = next(x for x in page.splitlines() if x.startswith(f"| {model} | {row['optimizer']} |"))
        assert all(cell in line for cell in cells), (line, cells)


def test_no_image_is_in_two_parts(vision):
    rows = torch.cat(vision.PARTS)
    assert len(vision.DIGITS["test"][1]) == 500
    assert torch.equal(rows.sort().values, torch.arange(1797))


@pytest.mark.parametrize("name", ["AdamW", "Sophia-G", "Sophia-H"])
@pytest.mark.parametrize("optimum", [1e-4, 4e-3, 1.6e-2, 2.0])
def test_every_optimizer_gets_the_same_number_of_trials(vision, name, optimum, monkeypatch):
    """Wherever its best learning rate lies; and an optimum beyond the grid is found."""
    tried = []

    def train(race, model, name, known, seed, part):
        tried.append((known, seed, part))
        loss = math.log2(dict(known)["lr"] / optimum) ** 2
        return [(1, math.nan if dict(known)["lr"] > 4 else loss, 0.5)]

    monkeypatch.setattr(vision, "train", train)
    found, runs = vision.contest(vision.FULL, "ViT", name)
    search = [(known, seed) for known, seed, part in tried if part == "validation"]
    assert len(set(search)) == len(search) == vision.FULL.trials * len(vision.FULL.search_seeds)
    assert len(found.candidates) == vision.FULL.trials
    assert {seed for _, seed, part in tried if part == "test"}.isdisjoint(vision.FULL.search_seeds)
    assert len(runs) == len(vision.FULL.seeds)
    rates = [dict(one.settings)["lr"] for one in found.candidates]
    assert min(rates) < dict(found.best)["lr"] < max(rates) or found.edges


@pytest.mark.parametrize(
    ("gaps", "word"),
    [((0.010, 0.012, 0.011), "ahead of"), ((-0.010, -0.012, -0.011), "behind"), ((0.02, -0.01, 0.0), "not told apart")],
)
def test_vision_claims_what_its_interval_allows(vision, gaps, word):
    found = SimpleNamespace(candidates=(), best=(), edges=())
    base = [[(1, 0.5, accuracy)] for accuracy in (0.90, 0.80, 0.95)]
    ours = [[(1, 0.5, one[0][2] + gap)] for one, gap in zip(base, gaps, strict=True)]
    contests = {("ViT", "AdamW"): (found, base), ("ViT", "Sophia-G"): (found, ours)}
    verdict = vision.judge(vision.FULL._replace(seeds=(1, 2, 3)), contests)["verdict"]
    assert f"Sophia-G is {word}" in verdict


@pytest.mark.parametrize(("gaps", "word"), [((-0.01, -0.0101), "below"), ((0.01, 0.0101), "above"), ((0.01, 0), "not")])
def test_masked_claims_what_its_interval_allows(masked, gaps, word):
    base = (0.03, 0.05)
    curves = {"AdamW": [[(1, e)] for e in base], "Sophia-G": [[(1, e + g)] for e, g in zip(base, gaps, strict=True)]}
    assert f"is {word}" in masked.judge(curves)[2]


def test_the_filler_does_not_see_what_is_hidden(masked):
    images = masked.IMAGES["test"][:4]
    hidden = masked.hide(images, seed=3)
    assert 0.5 < hidden.float().mean() < 0.7
    model = masked.Filler()
    assert torch.equal(model(images, hidden), model(images.where(~hidden, 0.77), hidden))
    assert not torch.equal(model(images, hidden), model(images.where(hidden, 0.77), hidden))


def test_the_curvature_counts_what_the_loss_counts(masked, monkeypatch):
    handed, seen, build, refresh = [], [], masked.build, SophiaG.refresh_curvature

    def watched_build(name, model, lr, seed):
        model.register_forward_pre_hook(lambda _, args: seen.append(args[1]) if torch.is_grad_enabled() else None)
        return build(name, model, lr, seed)

    def watched(optimizer, forward):
        def noted():
            handed.append(forward())
            return handed[-1]

        return refresh(optimizer, noted)

    monkeypatch.setattr(masked, "build", watched_build)
    monkeypatch.setattr(SophiaG, "refresh_curvature", watched)
    masked.train(masked.QUICK, "Sophia-G", 1e-3, 1, "validation")
    ((_, mask),) = handed  # six steps have one refresh
    of_the_refresh, of_the_loss, *later = seen
    assert torch.equal(mask, of_the_refresh)
    assert torch.equal(mask, of_the_loss)
    assert 0.5 < mask.float().mean() < 0.7
    assert not any(torch.equal(mask, other) for other in later)  # other pixels in every step


@pytest.mark.parametrize("name", ["vision", "masked"])
def test_a_folder_that_cannot_be_made_is_one_line(name, request, tmp_path, monkeypatch, capsys):
    module = request.getfixturevalue(name)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as raised:
        module.main()
    assert raised.value.code == 2
    assert "name a folder" in capsys.readouterr().err
