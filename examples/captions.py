"""A captioner, pictures to words, trained by AdamW and by Sophia-G, and asked about combinations it has never seen.

    python examples/captions.py --out multimodal-out

A small convolutional encoder looks at a picture of coloured shapes (shapes.py draws it); a causal decoder with
cross-attention writes what is where. Both optimizers are searched by the same rule with the same number of trials, on a
seed of their own; then, for each of five fresh seeds, both begin with the same weights and see the same batches. Ends
in captions.png: held-out pictures with what was said of them, and the curves. Needs the extra `examples`.
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
    "Sophia-G": (2e-3, {"betas": (0.9, 0.99), "weight_decay": 0.2, "gamma": 0.5}, [("gamma", (0.1, 0.5, 2.0))]),
}


@dataclass(frozen=True, kw_only=True)
class Race:
    """What all runs have in common."""

    steps: int = 500
    batch: int = 32
    pictures: int = 4096
    asked: int = 256  # pictures to choose settings by, and pictures of held-out combinations
    warmup: float = 0.2  # of the steps
    evaluations: int = 10
    trials: int = 8
    seeds: int = 5


QUICK = Race(steps=4, batch=8, pictures=32, asked=16, evaluations=2, trials=3, seeds=2)


class Captioner(nn.Module):
    """Pictures and the words so far in, logits of the next words out."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = ((3, 16, 3, 2, 1), (16, 32, 3, 2, 1), (32, width, 3, 3, 0))  # 36, 18, 9, 3 pixels on a side
        self.look = nn.Sequential(*(part for size in sizes for part in (nn.Conv2d(*size), nn.GELU())))
        self.where = nn.Parameter(0.3 * torch.randn(9, width))  # of 3 x 3 fields
        self.words = nn.Embedding(len(shapes.WORDS), width)
        self.when = nn.Parameter(0.3 * torch.randn(shapes.LENGTH, width))
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, nn.LayerNorm(width))
        self.head = nn.Linear(width, len(shapes.WORDS))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """Pictures [rows, 3, 36, 36] and words [rows, length] -> logits [rows, length, vocabulary]."""
        seen = self.look(pictures).flatten(2).transpose(1, 2) + self.where
        length = words.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)  # what a word must not look at
        return self.head(self.decoder(self.words(words) + self.when[:length], seen, tgt_mask=later))


def predictions(model: nn.Module, pictures: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, mask): behind a caption's end there is nothing to predict, for the loss and for the curvature."""
    return model(pictures, words[:, :-1]), words[:, 1:] != shapes.PAD


def mean_loss(model: nn.Module, pictures: Tensor, words: Tensor) -> Tensor:
    """Nats a word, over the words that count."""
    logits, mask = predictions(model, pictures, words)
    return F.cross_entropy(logits[mask], words[:, 1:][mask])


def train(race: Race, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run: losses on the way, and at the end what the model says of the held-out pictures."""
    torch.manual_seed(seed)  # of the weights
    model = Captioner()
    made = {"AdamW": torch.optim.AdamW, "Sophia-G": functools.partial(SophiaG, seed=seed)}[name]
    optimizer = made(model.parameters(), **settings)
    data, order = shapes.data(race.pictures, race.asked), torch.Generator().manual_seed(seed)  # of the batches
    seen: dict[str, Any] = {"seed": seed, "steps": [], "validation_loss": [], "held_out_loss": []}
    for step in range(race.steps):
        rows = torch.randperm(race.pictures, generator=order)[: race.batch]
        batch = [part[rows] for part in data["train"][1:]]
        if name == "Sophia-G":
            # Four slices cost as much as the batch in one piece, and the estimate has a quarter of the variance.
            slices = zip(*(part.chunk(4) for part in batch), strict=True)
            optimizer.refresh_curvature([functools.partial(predictions, model, *part) for part in slices])
        mean_loss(model, *batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = warmup_cosine(step, total_steps=race.steps, warmup_steps=int(race.warmup * race.steps))
        optimizer.param_groups[0]["lr"] = settings["lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (race.steps // race.evaluations) == 0:
            seen["steps"].append(step + 1)
            for part in ("validation", "held_out"):
                with torch.no_grad():
                    loss = mean_loss(model, *data[part][1:]).item()
                seen[f"{part}_loss"].append(loss if math.isfinite(loss) else math.inf)
    if name == "Sophia-G":
        seen["clip_fraction"] = optimizer.stats()["clip_fraction"].item()
    scenes, pictures, _ = data["held_out"]
    said = generate(model, pictures)
    right = [words == shapes.caption(scene) for words, scene in zip(said, scenes, strict=True)]
    return {**seen, "right": sum(right) / len(right), "said": said[:10]}


@torch.no_grad()
def generate(model: nn.Module, pictures: Tensor) -> list[str]:
    """The likeliest next word, again and again, up to the end."""
    words = torch.full((len(pictures), 1), shapes.START)
    for _ in range(shapes.LENGTH - 1):
        words = torch.cat((words, model(pictures, words)[:, -1:].argmax(-1)), 1)
    rows = (itertools.takewhile(lambda word: word != shapes.END, row) for row in words[:, 1:].tolist())
    return [" ".join(shapes.WORDS[word] for word in row) for row in rows]


def marked(said: str, true: str) -> list[str]:
    """A line for each object, with brackets around words that are not the true ones and dots for missing ones."""
    lines = itertools.zip_longest(said.split(" and "), true.split(" and "), fillvalue="")
    pairs = (itertools.zip_longest(line.split(), truth.split(), fillvalue="…") for line, truth in lines)
    return [" ".join(word if word == right else f"[{word}]" for word, right in line) for line in pairs]


def draw(found: dict[str, Any], scenes: list[shapes.Scene], pictures: Tensor, sentence: str, path: Path) -> None:
    """The first ten held-out pictures with what the models of the first seed say of them, and the curves of all."""
    style = looks(list(found), "AdamW", "Sophia-G")
    figure = Figure(figsize=(11, 9))
    figure.suptitle("Combinations of colour, shape and place that no training picture had; [wrong] words in brackets")
    grid = figure.add_gridspec(2, 5, left=0.01, right=0.99, top=0.94, bottom=0.47, hspace=0.75)
    for place, (scene, picture) in enumerate(zip(scenes[:10], pictures, strict=False)):
        axis = figure.add_subplot(grid[divmod(place, 5)])
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_axis_off()
        for name, top in zip(found, (-0.04, -0.38), strict=True):
            lines = [f"{name}:", *marked(found[name]["runs"][0]["said"][place], shapes.caption(scene))]
            for number, line in enumerate(lines):
                colour = "#b3261e" if "[" in line else style[name].color
                axis.text(0, top - 0.1 * number, line, transform=axis.transAxes, va="top", fontsize=8, color=colour)
    edges = {"top": 0.29, "bottom": 0.1, "left": 0.08, "right": 0.98}
    losses, right = figure.subplots(1, 2, width_ratios=(3, 2), gridspec_kw=edges)
    for name, look in style.items():
        runs = found[name]["runs"]
        for run in runs:
            losses.plot(run["steps"], run["held_out_loss"], color=look.color, linestyle=look.linestyle, linewidth=0.5)
        mean = torch.tensor([run["held_out_loss"] for run in runs]).mean(0).tolist()
        losses.plot(runs[0]["steps"], mean, **look._asdict(), markersize=4, label=name)
        right.plot([run["seed"] for run in runs], [100 * run["right"] for run in runs], look.marker, color=look.color)
    losses.set(xlabel="steps", yscale="log", title="loss on held-out combinations, nats a word")
    losses.legend(frameon=False)
    right.set(xlabel="seed", title="held-out captions right in every word, %", xticks=[run["seed"] for run in runs])
    figure.text(0.5, 0.015, sentence, ha="center", fontsize=9)
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
    sentence = shapes.verdict("Held-out captions right", found)
    asked.out.mkdir(parents=True, exist_ok=True)
    draw(found, *shapes.data(race.pictures, race.asked)["held_out"][:2], sentence, asked.out / "captions.png")
    result = {"verdict": sentence, "machine": machine.describe(), "seconds": round(time.perf_counter() - begun)}
    path = asked.out / "multimodal.json"  # of both examples
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine.write_json(path, {**kept, "captions": {**result, "race": asdict(race), "found": found}})
    print(f"{sentence}\nwritten to {asked.out / 'captions.png'} and {path}")


if __name__ == "__main__":
    main()
