"""`loss.png` of any run, long or short, healthy or not."""

import json
import math
import random

import numpy as np
import pytest
from matplotlib.figure import Figure

from sophia import plot_run
from sophia.plot_run import draw_run
from tests.pictures import is_picture


def training(step, **more):
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": 3 + 4 * math.exp(-step / 50) + random.Random(step).gauss(0, 0.05),
        "lr": 1e-3,
        "grad_norm": 0.5,
        "clip_fraction": 0.4,
        "tokens_per_second": 1e4,
        "elapsed_seconds": step,
        **more,
    }


def evaluation(step, loss=3.5):
    return {"step": step, "tokens": 2048 * step, "val_loss": loss, "perplexity": 9.0, "elapsed_seconds": step}


def run(folder, records):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The panels of what is drawn, by their labels."""
    panels = {}
    save = Figure.savefig

    def look(figure, *args, **kwargs):
        panels.clear()
        panels.update({axes.get_ylabel(): axes for axes in figure.axes}, title=figure.get_suptitle())
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", look)
    return panels


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_a_whole_run(tmp_path, drawn):
    records = [evaluation(0, 7.0), *(training(t) for t in range(10, 1001, 10)), evaluation(500, 3.25), evaluation(1000)]
    path = draw_run(run(tmp_path / "my-run", records))
    assert path == tmp_path / "my-run" / "loss.png"
    assert is_picture(path)
    assert set(drawn) == {"loss (nats a token)", "learning rate", "clipped", "gradient norm", "title"}
    assert drawn["title"] == "my-run: validation loss 3.5000 after 1000 steps"
    losses = drawn["loss (nats a token)"]
    assert labels(losses) == ["training, smoothed", "validation"]
    raw, smooth, validation = losses.lines
    assert raw.get_ydata().tolist() == [record["loss"] for record in records if "loss" in record]
    assert validation.get_xydata().tolist() == [[0, 7], [500, 3.25], [1000, 3.5]]
    assert np.std(np.diff(smooth.get_ydata()[20:])) < 0.3 * np.std(np.diff(raw.get_ydata()[20:]))
    low, high = losses.get_ylim()
    assert low < min(raw.get_ydata())
    assert high < 4.5  # the fall from 7 would flatten the rest


def test_the_smoothed_loss_does_not_lag_and_passes_over_what_is_not_finite():
    falling = [100.0 - t for t in range(200)]
    assert np.allclose(plot_run._smoothed(falling)[:190], falling[:190])
    flat = [math.nan, 2.0, 2.0, math.inf, *[2.0] * 300]
    smooth = plot_run._smoothed(flat)
    assert math.isnan(smooth[0])
    assert np.allclose(smooth[16:], 2.0)
    assert plot_run._smoothed([]) == []


@pytest.mark.parametrize(
    ("records", "panels", "shown"),
    [
        ([training(t) for t in (1, 2, 3)], 4, ["training"]),
        ([training(1)], 4, ["training"]),
        ([evaluation(0)], 1, ["validation"]),
        ([training(t, clip_fraction=None) for t in range(1, 40)], 3, ["training, smoothed"]),
        ([{k: v for k, v in training(1).items() if k != "clip_fraction"}], 3, ["training"]),
        ([training(t, loss=None, grad_norm=None) for t in (1, 2)], 3, ["training", "not finite"]),
        ([training(1, lr=0.0, grad_norm=0.0, clip_fraction=0.0, loss=0.0)], 4, ["training"]),
        ([evaluation(0, None), training(1), evaluation(3, None)], 4, ["training", "validation", "not finite"]),
        ([{"step": 4, "event": "skipped"}], 1, ["skipped"]),
        ([], 1, []),
    ],
)
def test_short_and_sick_runs(tmp_path, drawn, records, panels, shown):
    assert is_picture(draw_run(run(tmp_path, records)))
    assert len(drawn) - 1 == panels
    assert labels(drawn["loss (nats a token)"]) == shown


def test_events_are_marked_in_all_panels_and_named_once(tmp_path, drawn):
    events = [
        {"step": 100 * k, "event": kind} for k in (1, 2, 3) for kind in ("spike", "rollback", "skipped", "paused")
    ]
    draw_run(run(tmp_path, [*(training(t) for t in range(1, 400)), *events]))
    named = labels(drawn["loss (nats a token)"])
    assert named == ["training, smoothed", "spike", "rollback", "skipped", "paused"]
    for panel in (axes for name, axes in drawn.items() if name != "title"):
        marks = [line for line in panel.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1]
        assert sorted({line.get_xdata()[0] for line in marks}) == [100, 200, 300]


def test_one_spike_of_the_gradient_leaves_the_rest_visible(tmp_path, drawn):
    draw_run(run(tmp_path, [training(t, grad_norm=1e4 if t == 50 else 0.5 + t / 1000) for t in range(1, 100)]))
    assert drawn["gradient norm"].get_yscale() == "log"
    draw_run(run(tmp_path, [training(t) for t in range(1, 100)]))
    assert drawn["gradient norm"].get_yscale() == "linear"


def test_tokens_stand_above_the_steps(tmp_path, drawn):
    draw_run(run(tmp_path, [training(t) for t in range(1, 100)]))
    (tokens,) = drawn["loss (nats a token)"].child_axes
    assert tokens.get_xlabel() == "tokens"
    assert tokens.get_xlim()[1] == pytest.approx(2048 * drawn["loss (nats a token)"].get_xlim()[1])


def test_a_run_that_is_still_going(tmp_path):
    folder = run(tmp_path, [training(1), training(2)])
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert is_picture(draw_run(folder))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        draw_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no json\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not a line of metrics"):
        draw_run(tmp_path)
    assert not (tmp_path / "loss.png").exists()
