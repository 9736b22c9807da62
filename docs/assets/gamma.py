"""The picture of docs/optimizer.md: what γ does to the clipped share and to the loss.

`python docs/assets/gamma.py` draws gamma.svg from gamma.json; with `--measure` it trains first, a minute or two on one
core, and writes gamma.json.
"""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sophia import machine
from sophia.race import RaceSettings, SophiaGRecipe, prepare_text, race, start_runs

HERE = Path(__file__).parent
GAMMAS = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SETTINGS = RaceSettings(
    steps=300,
    batch_size=8,
    context=64,
    layers=2,
    width=64,
    vocab_size=512,
    text_bytes=2_000_000,
    validation_windows=64,
    validation_interval=20,
)


def measure(settings: RaceSettings = SETTINGS) -> str:
    """Train one small model for each γ, same weights and batches, and return gamma.json."""
    text = prepare_text(settings)
    runs = start_runs(settings, [SophiaGRecipe(gamma=gamma) for gamma in GAMMAS])
    for _ in race(settings, runs, text):
        pass
    found = {
        "command": "python docs/assets/gamma.py --measure",
        "settings": asdict(settings),
        "lr": runs[0].recipe.lr,
        "text_sha256": text.fingerprint,
        "machine": machine.describe(),
        "runs": [
            {
                "gamma": run.recipe.gamma,
                "steps": [point.step for point in run.validations[1:]],
                "clip_fraction": [round(share, 4) for share in run.clip_fractions],
                "val_loss": [round(point.loss, 4) for point in run.validations[1:]],
            }
            for run in runs
        ],
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def draw(text: str, path: Path) -> None:
    """Clipped share against steps, and the last loss against the clipped share; letters are drawn as curves."""
    found = json.loads(text)
    runs = sorted(found["runs"], key=lambda run: run["gamma"])
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "gamma"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        share, loss = figure.subplots(1, 2)
        for index, run in enumerate(runs):
            colour = mpl.colormaps["viridis"](0.9 * index / (len(runs) - 1))
            share.plot(run["steps"], run["clip_fraction"], color=colour, linewidth=1.8, label=f"{run['gamma']:g}")
            loss.plot(run["clip_fraction"][-1], run["val_loss"][-1], marker="o", markersize=7, color=colour)
        loss.plot([r["clip_fraction"][-1] for r in runs], [r["val_loss"][-1] for r in runs], color="#bbb", zorder=0)
        figure.legend(*share.get_legend_handles_labels(), title="γ", loc="outside right upper", frameon=False)
        share.axhspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
        loss.axvspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
        share.set(xlabel="steps", ylabel="clipped coordinates", ylim=(0, 1.03), title="while training")
        loss.set(xlabel="clipped at the end", ylabel="validation loss (nats)", xlim=(0, 1.03), title="at the end")
        loss.margins(y=0.2)
        share.yaxis.set_major_formatter(PercentFormatter(1))
        loss.xaxis.set_major_formatter(PercentFormatter(1))
        figure.savefig(path, metadata={"Date": None, "Description": f"gamma.json {digest(text)}"})


def digest(text: str) -> str:
    """SHA-256 of gamma.json, which the picture carries."""
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train first")
    if parser.parse_args().measure:
        torch.set_num_threads(1)
        (HERE / "gamma.json").write_text(measure(), encoding="utf-8")
    draw((HERE / "gamma.json").read_text(encoding="utf-8"), HERE / "gamma.svg")


if __name__ == "__main__":
    main()
