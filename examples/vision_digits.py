"""AdamW, Sophia-G and Sophia-H train a small CNN with BatchNorm and a small ViT on real images, by the judge's rules.

    python examples/vision_digits.py --out vision-out

The images are scikit-learn's 1797 handwritten digits. Every optimizer is searched by one rule with one number of trials
(`sophia.study.search`), on seeds and images of their own; then come fresh seeds, in pairs of equal weights, batches and
schedule (docs/protocol.md). About two minutes on two cores; needs the extra `examples`. --quick is for tests.
"""

import argparse
import itertools
import math
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor, multiprocessing, nn
from torch.func import functional_call
from torch.nn import functional as F

from sophia import SophiaG, SophiaH, machine
from sophia.report.looks import looks
from sophia.schedule import warmup_cosine
from sophia.study.runs import Settings, settings
from sophia.study.search import search
from sophia.study.statistics import mean

# Images [rows, 1, 8, 8] from -1 to 1 and their digits, in three parts that no seed changes.
PARTS = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).split([997, 300, 500])
IMAGES, LABELS = (torch.tensor(values) for values in sklearn.datasets.load_digits(return_X_y=True))
IMAGES = IMAGES.float().view(-1, 1, 8, 8) / 8 - 1
DIGITS = {name: (IMAGES[rows], LABELS[rows]) for name, rows in zip(("train", "validation", "test"), PARTS, strict=True)}
# The optimizer and what its search begins with: learning rate, other settings, and one of them to try at three values.
SEARCHES = {
    "AdamW": (torch.optim.AdamW, 1.6e-2, {"beta2": 0.98, "weight_decay": 0.1}, ("beta2", (0.95, 0.98, 0.99))),
    "Sophia-G": (SophiaG, 4e-3, {"beta2": 0.99, "weight_decay": 0.2, "gamma": 0.5}, ("gamma", (0.1, 0.5, 2.0))),
    "Sophia-H": (SophiaH, 2e-3, {"beta2": 0.99, "weight_decay": 0.2, "gamma": 0.1}, ("gamma", (0.02, 0.1, 0.5))),
}
# What all runs have in common. A trial's loss is the mean over the search's seeds: that of one run is mostly luck.
Race = namedtuple("Race", "steps batch evaluations trials search_seeds seeds")
FULL = Race(steps=300, batch=32, evaluations=15, trials=8, search_seeds=(101, 102), seeds=(1, 2, 3, 4, 5, 6))
QUICK = Race(steps=4, batch=16, evaluations=2, trials=3, search_seeds=(101,), seeds=(1, 2))


class ViT(nn.Module):
    """16 patches of 2x2 pixels, two transformer blocks, the mean of what they make of the patches."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        shape = {"d_model": width, "nhead": 4, "dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu"}
        blocks = (nn.TransformerEncoderLayer(**shape, batch_first=True, norm_first=True) for _ in range(2))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[rows, 1, 8, 8] -> logits [rows, 10]."""
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)  # [rows, 16, 4]
        return self.head(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))


def cnn() -> nn.Module:
    """Three convolutions, each with BatchNorm."""
    layers = [(1, 16, 1), (16, 32, 2), (32, 32, 2)]
    blocks = ((nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in layers)
    return nn.Sequential(*itertools.chain(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


MODELS = {"ViT": ViT, "CNN with BatchNorm": cnn}


def without_memory(model: nn.Module, images: Tensor) -> Tensor:
    """The model's training forward, of which BatchNorm's running statistics see nothing: they are written to copies."""
    return functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, (images,))


def build(name: str, model: nn.Module, known: Settings, seed: int) -> torch.optim.Optimizer:
    """An optimizer by its name and settings; matrices and filters decay, vectors do not."""
    chosen = dict(known)
    decay, chosen["betas"] = chosen.pop("weight_decay"), (0.9, chosen.pop("beta2"))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    more = {"fused": True} if name == "AdamW" else {"seed": seed}
    return SEARCHES[name][0](groups, **more, **chosen)


def train(race: tuple, model_name: str, name: str, known: Settings, seed: int, part: str) -> list[tuple]:
    """One run: steps, loss in nats and share of right answers on a part of the images, at every evaluation."""
    torch.manual_seed(seed)  # of weights and batches
    model, curve = MODELS[model_name](), []
    optimizer, peak = build(name, model, known, seed), dict(known)["lr"]
    (images, labels), (others, answers) = DIGITS["train"], DIGITS[part]
    rows = torch.cat([torch.randperm(len(images)) for _ in range(race.steps)]).split(race.batch)
    for step in range(race.steps):
        x, y = images[rows[step]], labels[rows[step]]
        if name == "Sophia-G":
            optimizer.refresh_curvature(lambda x=x: without_memory(model, x))
        elif name == "Sophia-H":
            optimizer.refresh_curvature(lambda x=x, y=y: F.cross_entropy(without_memory(model, x), y))
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup_cosine(step, total_steps=race.steps, warmup_steps=race.steps // 5)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (race.steps // race.evaluations) == 0:
            logits = model.eval()(others).detach()
            model.train()
            right = (logits.argmax(1) == answers).double().mean()
            curve.append((step + 1, F.cross_entropy(logits, answers).item(), right.item()))
    return curve


def contest(race: tuple, model_name: str, name: str) -> tuple:
    """An optimizer's search on a model, and its runs with fresh seeds at the best settings found."""
    torch.set_num_threads(1)  # in each process: small tensors gain nothing from more
    (_, lr, others, option), losses = SEARCHES[name], {}
    begin = {"lr": lr, "others": settings(**others), "options": [option], "trials": race.trials, "factor": 2.0}
    while not (found := search(**begin, loss_of=losses.get)).done:
        for known in (one.settings for one in found.candidates if one.loss is None):
            ends = [train(race, model_name, name, known, seed, "validation")[-1][1] for seed in race.search_seeds]
            losses[known] = sum(ends) / len(ends) if all(map(math.isfinite, ends)) else math.inf
    print(f"{name} on the {model_name}: {dict(found.best)}", *found.edges, sep="; ", flush=True)
    return found, [train(race, model_name, name, found.best, seed, "test") for seed in race.seeds]


def judge(race: tuple, contests: dict[tuple[str, str], tuple]) -> dict:
    """What came out. Nothing is claimed where the interval of the paired difference from AdamW holds 0."""
    rows, verdict = [], []
    for (model, name), (found, runs) in contests.items():
        trials = [{**dict(one.settings), "why": one.why, "loss": one.loss} for one in found.candidates]
        row = {"model": model, "optimizer": name, "best": dict(found.best), "edges": found.edges, "trials": trials}
        for column, measure in enumerate(("loss", "accuracy"), start=1):
            ours, theirs = ([run[-1][column] for run in its] for its in (runs, contests[model, "AdamW"][1]))
            gap = mean([one - other for one, other in zip(ours, theirs, strict=True)])
            row |= {measure: asdict(mean(ours)), f"{measure}_minus_adamw": asdict(gap)}
        rows.append({**row, "runs": runs})
        word = "ahead of" if gap.low > 0 else "behind" if gap.high < 0 else "not told apart from"
        if name != "AdamW":
            verdict.append(f"{name} is {word} AdamW on the {model} ({span(asdict(gap), 100)} points)")
    return {"verdict": f"Test accuracy after {race.steps} steps: {', '.join(verdict)}.", "rows": rows}


def span(estimate: dict, unit: float = 1, digits: int = 1) -> str:
    """A number and its 95 % interval."""
    value, low, high = (f"{unit * estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy and loss on the test images against steps: means over seeds, and their 95 % intervals as bands."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, len(MODELS), sharex=True, sharey="row")
    for row in rows:
        place, look = list(MODELS).index(row["model"]), looks(list(SEARCHES), "AdamW", "Sophia-G")[row["optimizer"]]
        for axes, column in zip(grid[:, place], (2, 1), strict=True):
            points = [mean([point[column] for point in points]) for points in zip(*row["runs"], strict=True)]
            steps = [point[0] for point in row["runs"][0]]
            axes.plot(steps, [p.value for p in points], label=row["optimizer"], markersize=3.5, **look._asdict())
            axes.fill_between(steps, [p.low for p in points], [p.high for p in points], color=look.color, alpha=0.15)
            axes.set(title=row["model"] if column == 2 else "", xlabel="steps" if column == 1 else "")
    grid[0, 0].set(ylabel="accuracy on 500 test images", ylim=(0.5, 1))
    grid[1, 0].set(ylabel="loss on them (nats)", yscale="log")
    grid[0, 0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, race, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vision-out"), help="folder to write to")
    quick = {"dest": "race", "action": "store_const", "const": QUICK, "default": FULL}
    parser.add_argument("--quick", **quick, help="a few steps in one process, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    jobs = [(args.race, *place) for place in itertools.product(MODELS, SEARCHES)]
    if args.race is QUICK:
        done = list(itertools.starmap(contest, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool() as pool:  # one process a core
            done = pool.starmap(contest, jobs, chunksize=1)
    results = judge(args.race, {job[1:]: one for job, one in zip(jobs, done, strict=True)})
    print(f"{'model':20}{'optimizer':11}{'accuracy (%)':20}{'loss (nats)':22}accuracy - AdamW's (points)")
    for row in results["rows"]:
        numbers = f"{span(row['accuracy'], 100):20}{span(row['loss'], digits=3):22}"
        print(f"{row['model']:20}{row['optimizer']:11}{numbers}{span(row['accuracy_minus_adamw'], 100)}")
    print(results["verdict"])
    draw(results["rows"], args.out / "vision-digits.png")
    own = {"settings": args.race._asdict(), "machine": machine.describe(), "scikit_learn": sklearn.__version__}
    machine.write_json(args.out / "vision-digits.json", {"command": "python examples/vision_digits.py"} | own | results)


if __name__ == "__main__":
    main()
