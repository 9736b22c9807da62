"""The examples with pictures and words: they run, they ask about what was never seen, and their curvature is right."""

import functools
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett
from sophia.optim.curvature import likelihood
from tests.exact import flat, refresh
from tests.pictures import is_picture

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
captions, contrastive, shapes = map(importlib.import_module, ("captions", "contrastive", "shapes"))
sys.path.pop(0)


# ---- they run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multimodal")


@pytest.mark.parametrize(("example", "measure"), [(captions, "held_out_loss"), (contrastive, "held_out_accuracy")])
def test_example_runs_in_its_short_form(example, measure, folder, capsys):
    name, race = example.__name__, example.QUICK
    example.main(["--quick", "--out", str(folder)])
    assert is_picture(folder / f"{name}.png")
    result = json.loads((folder / "multimodal.json").read_text(encoding="utf-8"))[name]
    assert result["verdict"] in capsys.readouterr().out
    assert {"cpu", "torch", "sophia", "date"} <= result["machine"].keys()
    for found in result["found"].values():
        assert len(found["trials"]) == race.trials
        assert found["best"]["lr"] in [trial["lr"] for trial in found["trials"]]
        assert [run["seed"] for run in found["runs"]] == list(range(1, race.seeds + 1))
        for run in found["runs"]:
            assert run["steps"] == [2, 4]
            assert len(run[measure]) == len(run["validation_loss"]) == race.evaluations
            assert 0 <= run["right"] <= 1
    assert all(0 < run["clip_fraction"] <= 1 for run in result["found"]["Sophia-G"]["runs"])


def test_both_results_stand_in_one_file(folder):
    (folder / "multimodal.json").write_text('{"captions": "kept"}', encoding="utf-8")
    contrastive.main(["--quick", "--out", str(folder)])
    result = json.loads((folder / "multimodal.json").read_text(encoding="utf-8"))
    assert result["captions"] == "kept"
    assert "shown" not in result["contrastive"]["found"]["AdamW"]["runs"][0]


@pytest.mark.parametrize("example", [captions, contrastive])
def test_out_must_be_a_folder(example, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        example.main(["--quick", "--out", str(tmp_path / "file")])
    assert "file is a file: name a folder" in capsys.readouterr().err


# ---- what is asked was never seen


def test_held_out_combinations_never_appear_in_training():
    data = shapes.data(1024, 256)
    seen = {one for part in ("train", "validation") for scene in data[part][0] for one in scene}
    held_out = {one for scene in data["held_out"][0] for one in scene}
    assert len(held_out) == 45
    assert len(seen) == 6 * 5 * 9 - 45
    assert not seen & held_out
    for first, second in itertools.combinations(range(3), 2):  # no pair of parts is new
        pairs = {(one[first], one[second]) for one in seen}
        assert {(one[first], one[second]) for one in held_out} <= pairs
    assert len({shapes.caption(scene) for scene in data["train"][0]}) == 1024  # no batch has a caption twice


def test_captions_and_words_are_those_of_the_scene():
    (scenes, pictures, words), length = shapes.data(32, 16)["train"], shapes.LENGTH
    assert shapes.caption(((0, 0, 0), (2, 4, 5))) == "red circle top left and blue ring middle right"
    assert (len(pictures), *words.shape) == (32, 32, length)
    for scene, row in zip(scenes, words.tolist(), strict=True):
        end = row.index(shapes.END)
        assert row[0] == shapes.START
        assert " ".join(shapes.WORDS[word] for word in row[1:end]) == shapes.caption(scene)
        assert row[end + 1 :] == [shapes.PAD] * (length - end - 1)
    assert {words[row].count_nonzero().item() for row in range(32)} == {6, 11}  # so padding is there to be masked


@pytest.mark.parametrize(("colour", "paint"), list(enumerate(shapes.COLOURS.values())))
def test_pictures_show_colour_and_place(colour, paint):
    square = shapes.SHAPES.index("square")
    for place, picture in enumerate(shapes.render([((colour, square, place),) for place in range(9)], seed=colour)):
        row, column = (part * 12 + 6 for part in divmod(place, 3))
        middle = picture[:, row - 1 : row + 2, column - 1 : column + 2].mean((1, 2))
        torch.testing.assert_close(middle, torch.tensor(paint), atol=0.15, rtol=0)
        apart = (picture - picture.median(2).values.median(1).values[:, None, None]).abs().amax(0) > 0.2
        rows, columns = apart.nonzero().double().mean(0).tolist()
        assert abs(rows + 0.5 - row) < 2.5
        assert abs(columns + 0.5 - column) < 2.5


def test_wrong_words_are_marked():
    true = "red circle top left and blue ring middle right"
    assert captions.marked(true, true) == true.split(" and ")
    said = "red square top left and blue ring"
    assert captions.marked(said, true) == ["red [square] top left", "blue ring […] […]"]
    assert captions.marked("", "red ring top left") == ["[…] […] […] […]"]


def test_no_claim_where_the_interval_holds_zero():
    def found(adamw, sophia):
        shares = {"AdamW": adamw, "Sophia-G": sophia}
        return {n: {"runs": [{"seed": i, "right": share} for i, share in enumerate(s)]} for n, s in shares.items()}

    assert shapes.verdict("x", found([0.1, 0.2, 0.3], [0.2, 0.3, 0.4001])).endswith(": Sophia-G is ahead")
    assert shapes.verdict("x", found([0.2, 0.3, 0.4001], [0.1, 0.2, 0.3])).endswith(": AdamW is ahead")
    assert shapes.verdict("x", found([0.1, 0.2, 0.3], [0.2, 0.2, 0.4])).endswith(": no difference shown")


# ---- the curvature of the contrastive form

PAIRS = 2


@pytest.fixture(scope="module")
def matcher():
    torch.manual_seed(0)
    model = contrastive.Matcher(width=4).double()
    _, pictures, words = shapes.data(32, 16)["train"]
    return model, (pictures[:PAIRS].double(), words[:PAIRS])


def exact_diagonal(model, batch):
    """Of the Gauss-Newton matrix of the mean loss, from the Hessian of that loss in the one matrix of similarities."""
    params, similar = list(model.parameters()), model(*batch)[0]

    def loss(values):
        return contrastive.mean_loss(torch.stack((values, values.T)))

    middle = torch.func.hessian(loss)(similar.detach()).reshape(similar.numel(), -1)
    rows = [torch.autograd.grad(one, params, retain_graph=True) for one in similar.flatten()]
    jacobian = torch.stack([flat(row) for row in rows])  # [pairs x pairs, parameters]
    return torch.einsum("ap,ab,bp->p", jacobian, middle, jacobian)


def expected_estimate(monkeypatch, forward, params, directions, **settings):
    """The mean of the estimates over all labels that could be drawn, each weighted by its probability."""
    total = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for labels in itertools.product(range(PAIRS), repeat=directions * PAIRS):
        chosen, weights = torch.tensor(labels), []

        def draw(probs, uniform, chosen=chosen, weights=weights):
            weights.append(probs.gather(1, chosen[:, None]).prod().item())
            return chosen

        monkeypatch.setattr(likelihood, "sample_categorical", draw)
        estimate = GaussNewtonBartlett(**settings).estimate([forward], params, refresh())
        total += weights[0] * flat(estimate)
    return total


@pytest.mark.parametrize("chunks", [1, 2])
def test_contrastive_curvature_is_the_gauss_newton_diagonal(chunks, matcher, monkeypatch):
    # Two chunks hold a direction each: rows of the logits are dealt, not rows of the batch.
    model, batch = matcher
    params = list(model.parameters())
    found = expected_estimate(monkeypatch, functools.partial(model, *batch), params, 2, chunks=chunks)
    exact = exact_diagonal(model, batch)
    assert exact.max() > 0
    torch.testing.assert_close(found, exact, atol=1e-6 * exact.max().item(), rtol=1e-5)


def test_one_direction_is_another_matrix(matcher, monkeypatch):
    model, batch = matcher
    params = list(model.parameters())
    found = expected_estimate(monkeypatch, lambda: model(*batch)[:1], params, 1)
    exact = exact_diagonal(model, batch)
    assert (found - exact).norm() > 0.05 * exact.norm()


def test_labels_of_both_directions_are_drawn_independently():
    torch.manual_seed(1)
    pairs, draws = 3, 2000
    similar = torch.nn.Parameter(torch.randn(pairs, pairs, dtype=torch.float64))
    p, q = similar.softmax(1).detach(), similar.softmax(0).detach()
    exact = (p * (1 - p) + q * (1 - q)) / (2 * pairs)
    mean = torch.zeros_like(exact)
    for step in range(draws):
        forward = lambda: torch.stack((similar, similar.T))  # noqa: E731
        mean += GaussNewtonBartlett().estimate([forward], [similar], refresh(step))[0] / draws
    torch.testing.assert_close(mean, exact, rtol=0.1, atol=0)


def test_attach_needs_the_whole_batch():
    def curvature(wire):
        torch.manual_seed(0)
        model = contrastive.Matcher(width=8)
        optimizer = SophiaG(model.parameters())
        _, pictures, words = shapes.data(32, 16)["train"]
        wire(model, optimizer, (pictures[:8], words[:8]))
        contrastive.mean_loss(model(pictures[:8], words[:8])).backward()
        optimizer.step()
        return flat(optimizer.state[p]["hessian"] for p in model.parameters())

    plain = curvature(lambda model, optimizer, batch: optimizer.refresh_curvature(functools.partial(model, *batch)))
    whole = curvature(lambda model, optimizer, batch: optimizer.attach(model, max_batch=8))
    part = curvature(lambda model, optimizer, batch: optimizer.attach(model, max_batch=4))
    torch.testing.assert_close(whole, plain, rtol=0, atol=0)
    assert (part - plain).norm() > 0.1 * plain.norm()


# ---- padding


@pytest.fixture(scope="module")
def short():
    """A captioner and three captions of one object, which fill 6 of the 11 places."""
    torch.manual_seed(0)
    scenes, pictures, words = shapes.data(32, 16)["train"]
    rows = [row for row, scene in enumerate(scenes) if len(scene) == 1][:3]
    return captions.Captioner(width=16).double(), pictures[rows].double(), words[rows]


def captioner_curvature(model, forward):
    estimate = GaussNewtonBartlett().estimate([forward], list(model.parameters()), refresh())
    return dict(zip(dict(model.named_parameters()), estimate, strict=True))


def test_padding_does_not_enter_the_curvature(short):
    model, pictures, words = short
    padded = captioner_curvature(model, lambda: captions.predictions(model, pictures, words))
    cut = captioner_curvature(model, lambda: captions.predictions(model, pictures, words[:, :6]))
    torch.testing.assert_close(flat(padded.values()), flat(cut.values()), rtol=1e-4, atol=1e-12)
    assert padded["words.weight"][shapes.PAD].eq(0).all()
    assert padded["when"][5:].eq(0).all()
    assert padded["when"][:5].ne(0).all()
    unmasked = captioner_curvature(model, lambda: model(pictures, words[:, :-1]))
    assert unmasked["when"][5:].ne(0).any()


def test_padding_does_not_enter_the_loss(short):
    model, pictures, words = short
    padded, cut = captions.mean_loss(model, pictures, words), captions.mean_loss(model, pictures, words[:, :6])
    torch.testing.assert_close(padded, cut)
