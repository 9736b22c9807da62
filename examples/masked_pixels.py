"""A small convolutional net fills in hidden pixels of real images: squared error, by AdamW and by Sophia-G.

    python examples/masked_pixels.py --out masked-out

Of every 8x8 digit (scikit-learn's) six pixels in ten are hidden, others in every step, and the net is to tell their
values. Its outputs are no logits: `GaussNewtonBartlett(likelihood="gaussian")` is the estimator for squared errors, and
the mask that the loss counts is the mask of the refresh. Both optimizers get the same number of learning rates by the
same rule (`sophia.study.search`), then seeds of their own. About a minute on one core; needs the extra `examples`.
"""

import argparse
import math
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG, machine
from sophia.curvature import GaussNewtonBartlett
from sophia.report.looks import looks
from sophia.schedule import warmup_cosine
from sophia.study.candidates import Found, rate_of
from sophia.study.search import search
from sophia.study.statistics import Estimate, mean

HIDDEN = 0.6
SHOWN = 8
# Images [rows, 8, 8] from 0 to 1, in three parts that no seed changes.
ORDER = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).split([997, 300, 500])
PIXELS = torch.tensor(load_digits().images, dtype=torch.float32) / 16
IMAGES = {part: PIXELS[rows] for part, rows in zip(("train", "validation", "test"), ORDER, strict=True)}
# Where each search begins.
RATES = {"AdamW": 8e-3, "Sophia-G": 2e-3}
Race = namedtuple("Race", "steps batch evaluations trials search_seed seeds")
FULL = Race(steps=300, batch=32, evaluations=15, trials=6, search_seed=101, seeds=(1, 2, 3, 4, 5, 6))
QUICK = Race(steps=6, batch=16, evaluations=3, trials=3, search_seed=101, seeds=(1, 2))
Curve = list[tuple[int, float]]  # steps, mean squared error of the hidden pixels


class Filler(nn.Module):
    """Four convolutions, from what is visible and what is hidden to a value for every pixel."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(2, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 1, 3, padding=1)),
        )

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """[rows, 8, 8] and a bool mask of that shape -> values [rows, 8, 8]."""
        return self.layers(torch.stack([images.masked_fill(hidden, 0), hidden.float()], dim=1)).squeeze(1)


def hide(images: Tensor, seed: int) -> Tensor:
    """Which pixels are hidden, [rows, 8, 8]: a function of the seed."""
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) < HIDDEN


def build(name: str, model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    """An optimizer by its name; filters decay, vectors do not."""
    filters, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    decay = 0.1 if name == "AdamW" else 0.2
    groups = [{"params": filters, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    gaussian = GaussNewtonBartlett(likelihood="gaussian")
    return SophiaG(groups, lr=lr, betas=(0.9, 0.99), gamma="auto", estimator=gaussian, seed=seed)


def train(race: Race, name: str, lr: float, seed: int, part: str) -> tuple[nn.Module, Curve]:
    """One run, and its error on a part of the images; weights, batches and masks are those of the seed."""
    torch.manual_seed(seed)
    model, curve = Filler(), []
    optimizer = build(name, model, lr, seed)
    rows = torch.cat([torch.randperm(len(IMAGES["train"])) for _ in range(race.steps)]).split(race.batch)
    others, missing = IMAGES[part], hide(IMAGES[part], seed=0)
    for step in range(race.steps):
        images = IMAGES["train"][rows[step]]
        hidden = hide(images, seed=1 + 1000 * seed + step)
        if isinstance(optimizer, SophiaG):
            optimizer.refresh_curvature(lambda x=images, mask=hidden: (model(x, mask), mask))
        F.mse_loss(model(images, hidden)[hidden], images[hidden]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, total_steps=race.steps, warmup_steps=race.steps // 5)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (race.steps // race.evaluations) == 0:
            with torch.no_grad():
                curve.append((step + 1, F.mse_loss(model(others, missing)[missing], others[missing]).item()))
    return model, curve


def tune(race: Race, name: str) -> Found:
    """The search of the learning rate: the best of those tried is never the outermost while trials are left."""
    losses = {}
    while True:
        found = search(lr=RATES[name], others=(), options=[], trials=race.trials, factor=2.0, loss_of=losses.get)
        if found.done:
            return found
        for known in (one.settings for one in found.candidates if one.loss is None):
            error = train(race, name, rate_of(known), race.search_seed, "validation")[1][-1][1]
            losses[known] = error if math.isfinite(error) else math.inf
            print(f"{name}, learning rate {rate_of(known):g}: {error:.5f}", flush=True)


def judge(curves: dict[str, list[Curve]]) -> tuple[dict[str, Estimate], Estimate, str]:
    """Errors at the end, Sophia-G's minus AdamW's in pairs of one seed, and what that allows to say."""
    ends = {name: [curve[-1][1] for curve in its] for name, its in curves.items()}
    gap = mean([ours - theirs for ours, theirs in zip(ends["Sophia-G"], ends["AdamW"], strict=True)])
    word = "below" if gap.high < 0 else "above" if gap.low > 0 else "not told apart from"
    numbers = f"difference {gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]"
    sentence = f"Sophia-G's error after {curves['AdamW'][0][-1][0]} steps is {word} AdamW's ({numbers})."
    return {name: mean(values) for name, values in ends.items()}, gap, sentence


def draw(curves: dict[str, list[Curve]], models: dict[str, nn.Module], path: Path) -> None:
    """Held-out digits as they are, as the nets saw them and as these filled them in; errors against steps."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    pictures, errors = figure.subplots(1, 2, width_ratios=[1.9, 1])
    images, hidden = IMAGES["test"], hide(IMAGES["test"], seed=0)
    rows = {"original": images, "visible": images.masked_fill(hidden, math.nan)}
    with torch.no_grad():
        rows |= {
            f"filled in\nby {name}": images.where(~hidden, model(images, hidden)) for name, model in models.items()
        }
    # A frame of one pixel around each image.
    sheet = torch.cat([torch.cat([*F.pad(row[:SHOWN], (0, 1, 0, 1), value=-1)], dim=1) for row in rows.values()])
    colours = mpl.colormaps["gray_r"].with_extremes(bad="#9ecae1", under="white")
    pictures.imshow(sheet.numpy(), cmap=colours, vmin=0, vmax=1)
    pictures.set(xticks=[], yticks=[9 * place + 3.5 for place in range(len(rows))], yticklabels=rows)
    pictures.set_title("held-out digits; hidden pixels are blue")
    pictures.tick_params(length=0)
    pictures.spines[:].set_visible(False)
    for name, look in looks(list(curves), "AdamW", "Sophia-G").items():
        points = [mean([point[1] for point in points]) for points in zip(*curves[name], strict=True)]
        steps = [step for step, _ in curves[name][0]]
        errors.plot(steps, [p.value for p in points], label=name, markersize=3.5, **look._asdict())
        errors.fill_between(steps, [p.low for p in points], [p.high for p in points], color=look.color, alpha=0.15)
    blind = (IMAGES["train"].mean(0) - images)[hidden].square().mean().item()
    errors.axhline(blind, color="#63676b", linewidth=0.8, linestyle=":", label="each pixel's mean")
    errors.set(xlabel="steps", ylabel="squared error of hidden pixels", title="500 held-out digits")
    errors.legend(frameon=False)
    errors.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, search, train, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("masked-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    torch.set_num_threads(1)  # small tensors gain nothing from more
    race = QUICK if args.quick else FULL
    found = {name: tune(race, name) for name in RATES}
    runs = {n: [train(race, n, rate_of(found[n].best), seed, "test") for seed in race.seeds] for n in RATES}
    curves = {name: [curve for _, curve in its] for name, its in runs.items()}
    ends, gap, verdict = judge(curves)
    for name, end in ends.items():
        print(f"{name:10}{rate_of(found[name].best):<9g}{end.value:.5f} [{end.low:.5f}, {end.high:.5f}]")
    print(verdict)
    draw(curves, {name: its[0][0] for name, its in runs.items()}, args.out / "masked-pixels.png")
    results = {"study": "masked-pixels", "command": "python examples/masked_pixels.py", "settings": race._asdict()}
    results |= {"machine": machine.describe(), "verdict": verdict, "difference": asdict(gap), "curves": curves}
    results["trials"] = {n: [(rate_of(one.settings), one.loss) for one in f.candidates] for n, f in found.items()}
    machine.write_json(args.out / "masked-pixels.json", {**results, "errors": {n: asdict(e) for n, e in ends.items()}})


if __name__ == "__main__":
    main()
