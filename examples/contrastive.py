"""A contrastive model of pictures and words, trained by AdamW and by Sophia-G, and asked about what it has never seen.

    python examples/contrastive.py --out multimodal-out

Two encoders meet in one space: each picture has to find its caption among all of the batch, each caption its picture.
So the loss couples the rows of a batch, and `train` says what that means for the curvature. Searched and paired as
captions.py is; contrastive.png shows what held-out captions find, and the curves. Needs the extra `examples`.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shapes
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG, machine
from sophia.report.looks import looks
from sophia.schedule import warmup_cosine

# Where a search begins: the learning rate, the other settings, and which of those to try at which values.
STARTS = {
    "AdamW": (4e-3, {"betas": (0.9, 0.99), "weight_decay": 0.1}, [("weight_decay", (0.01, 0.1, 1.0))]),
    "Sophia-G": (4e-3, {"betas": (0.9, 0.99), "weight_decay": 0.2, "gamma": 0.1}, [("gamma", (0.02, 0.1, 0.5))]),
}


@dataclass(frozen=True, kw_only=True)
class Race:
    """What all runs have in common."""

    steps: int = 300
    batch: int = 64
    pictures: int = 4096
    asked: int = 256  # pairs to choose settings by, and pairs of held-out combinations
    warmup: float = 0.2  # of the steps
    evaluations: int = 10
    trials: int = 8
    seeds: int = 5


QUICK = Race(steps=4, batch=8, pictures=32, asked=32, evaluations=2, trials=3, seeds=2)


class Matcher(nn.Module):
    """Pictures and captions in, their similarities out."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = ((3, 16, 5, 3), (16, 32, 3, 2), (32, width, 3, 2))
        look = (part for i, o, k, s in sizes for part in (nn.Conv2d(i, o, k, s, 1), nn.GELU()))
        self.look = nn.Sequential(*look, nn.Flatten(), nn.Linear(9 * width, width))
        self.words = nn.Embedding(len(shapes.WORDS), width)
        self.when = nn.Parameter(0.3 * torch.randn(shapes.LENGTH, width))
        self.read = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.said = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))  # the logarithm of the inverse temperature, learned

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """[rows, 3, 36, 36] and [rows, length] -> logits [2, rows, rows].

        The first choose a caption for each picture, the second, which are the first transposed, a picture for each
        caption: one matrix of similarities, with a softmax over its rows and one over its columns.
        """
        padding = words == shapes.PAD
        read = self.read(self.words(words) + self.when, src_key_padding_mask=padding)
        said = self.said(read.masked_fill(padding.unsqueeze(-1), 0).sum(1) / (~padding).sum(1, keepdim=True))
        similar = self.scale.exp() * F.normalize(self.look(pictures), dim=-1) @ F.normalize(said, dim=-1).T
        return torch.stack((similar, similar.T))


def mean_loss(logits: Tensor) -> Tensor:
    """Mean of 2 x rows cross-entropies: the right answer of each row, in both directions, is its own number."""
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(logits.shape[1]).repeat(2))


def train(race: Race, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run: loss and accuracy on the way, and at the end what held-out captions find."""
    torch.manual_seed(seed)  # of the weights
    model = Matcher()
    made = {"AdamW": torch.optim.AdamW, "Sophia-G": functools.partial(SophiaG, seed=seed)}[name]
    optimizer = made(model.parameters(), **settings)
    data, order = shapes.data(race.pictures, race.asked), torch.Generator().manual_seed(seed)  # of the batches
    seen: dict[str, Any] = {"seed": seed, "steps": [], "validation_loss": [], "held_out_accuracy": []}
    for step in range(race.steps):
        rows = torch.randperm(race.pictures, generator=order)[: race.batch]
        batch = [part[rows] for part in data["train"][1:]]
        if name == "Sophia-G":
            # The loss is the mean of N = 2 x rows categorical losses over shared similarities; its Hessian in these is
            # the mean of theirs, and its Gauss-Newton matrix (1/N) Σ Jᵀ (diag p - p pᵀ) J over rows and columns. Logits
            # [2, rows, rows] are N predictions to the estimator. It draws a label for each on its own, so that products
            # of two of them vanish on average, and divides by N; one direction alone would be half the loss's matrix.
            # The batch goes in whole, not in slices as in captions.py: among a quarter of the captions the right one
            # is easier to find, which is another loss. So optimizer.attach(model) would want max_batch=race.batch, and
            # an estimator of chunks=1: it would cut the rows.
            optimizer.refresh_curvature(functools.partial(model, *batch))
        mean_loss(model(*batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = warmup_cosine(step, total_steps=race.steps, warmup_steps=int(race.warmup * race.steps))
        optimizer.param_groups[0]["lr"] = settings["lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (race.steps // race.evaluations) == 0:
            with torch.no_grad():
                loss = mean_loss(model(*data["validation"][1:])).item()
                held_out = model(*data["held_out"][1:])
            seen["steps"].append(step + 1)
            seen["validation_loss"].append(loss if math.isfinite(loss) else math.inf)
            found = held_out.argmax(-1) == torch.arange(race.asked)  # [2, pairs]
            seen["held_out_accuracy"].append(found.double().mean().item())
    if name == "Sophia-G":
        seen["clip_fraction"] = optimizer.stats()["clip_fraction"].item()
    shown = {"matches": held_out[1, :4].topk(3).indices.tolist(), "chances": held_out[1].softmax(-1)[:32, :32].tolist()}
    return {**seen, "right": seen["held_out_accuracy"][-1], "temperature": (-model.scale).exp().item(), "shown": shown}


def draw(found: dict[str, Any], scenes: list[shapes.Scene], pictures: Tensor, sentence: str, path: Path) -> None:
    """What held-out captions find by the models of the first seed, and the curves of all seeds."""
    style = looks(list(found), "AdamW", "Sophia-G")
    figure = Figure(figsize=(11, 6.9))
    figure.suptitle(
        f"What held-out captions find first among {len(pictures)} held-out pictures; the right one is framed"
    )
    grid = figure.add_gridspec(2, 16, width_ratios=(1, 1, 1, 0.2) * 4, left=0.04, right=1, top=0.86, bottom=0.57)
    for (row, name), column in itertools.product(enumerate(found), range(4)):
        for rank, match in enumerate(found[name]["runs"][0]["shown"]["matches"][column]):
            axis = figure.add_subplot(grid[row, 4 * column + rank])
            axis.imshow(pictures[match].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[], ylabel=name if column + rank == 0 else "")
            axis.spines[:].set(color="#00795a" if match == column else "none", linewidth=4)
            if (row, rank) == (0, 1):
                axis.set_title(shapes.caption(scenes[column]).replace(" and ", "\nand "), fontsize=9)
    edges = {"top": 0.45, "bottom": 0.13, "left": 0.05, "right": 0.98, "wspace": 0.25}
    *matrices, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.3), gridspec_kw=edges)
    for axis, (name, look) in zip(matrices, style.items(), strict=True):
        axis.imshow(found[name]["runs"][0]["shown"]["chances"], cmap="Greys", vmin=0, vmax=1)
        axis.set(title=f"{name}: chances of pictures", xlabel="picture", ylabel="caption", xticks=[], yticks=[])
        runs = found[name]["runs"]
        for run in runs:
            accuracy = [100 * share for share in run["held_out_accuracy"]]
            curves.plot(run["steps"], accuracy, color=look.color, linestyle=look.linestyle, linewidth=0.5)
        mean = torch.tensor([run["held_out_accuracy"] for run in runs]).mean(0).mul(100).tolist()
        curves.plot(runs[0]["steps"], mean, **look._asdict(), markersize=4, label=name)
    curves.set(xlabel="steps", title="held-out pairs found, %")
    curves.legend(frameon=False)
    figure.text(0.5, 0.025, sentence, ha="center", fontsize=9)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """Search, train, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("multimodal-out"), help="folder for picture and results")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs and nothing else")
    asked = parser.parse_args(arguments)
    if asked.out.exists() and not asked.out.is_dir():
        parser.error(f"--out {asked.out} is a file: name a folder")
    race, begun = QUICK if asked.quick else Race(), time.perf_counter()
    job = functools.partial(shapes.entrant, functools.partial(train, race), STARTS, race.trials, race.seeds)
    if asked.quick:
        found = {name: job(name) for name in STARTS}
    else:  # a process each, of one thread: these tensors are too small for two
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            found = dict(zip(STARTS, pool.map(job, STARTS), strict=True))
    sentence = shapes.verdict("Held-out pairs found", found)
    asked.out.mkdir(parents=True, exist_ok=True)
    held_out = shapes.data(race.pictures, race.asked)["held_out"]
    draw(found, *held_out[:2], sentence, asked.out / "contrastive.png")
    for run in (run for one in found.values() for run in one["runs"]):
        del run["shown"]
    result = {"verdict": sentence, "machine": machine.describe(), "seconds": round(time.perf_counter() - begun)}
    path = asked.out / "multimodal.json"  # of both examples
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine.write_json(path, {**kept, "contrastive": {**result, "race": asdict(race), "found": found}})
    print(f"{sentence}\nwritten to {asked.out / 'contrastive.png'} and {path}")


if __name__ == "__main__":
    main()
