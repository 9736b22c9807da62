"""What captions.py and contrastive.py share: pictures of coloured shapes with their captions, and the rules.

A picture holds one or two shapes, each in a field of its own of a grid of 3 x 3; its caption names them in reading
order: "red circle top left and blue ring middle right". One combination (colour, shape, place) in six is held out: no
training picture shows it, though every two of its three parts are seen together.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sophia.study.runs import settings
from sophia.study.search import search
from sophia.study.statistics import difference

COLOURS = {"red": (0.90, 0.15, 0.15), "green": (0.10, 0.70, 0.20), "blue": (0.20, 0.35, 0.95)}
COLOURS |= {"yellow": (0.95, 0.85, 0.10), "purple": (0.60, 0.20, 0.75), "white": (0.95, 0.95, 0.95)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(itertools.product(ROWS, COLUMNS))
WORDS = ("<pad>", "<start>", "<end>", "and", *COLOURS, *SHAPES, *ROWS, *COLUMNS)
PAD, START, END = 0, 1, 2
LENGTH, SIZE = 11, 36  # words at most: start, four, "and", four, end; pixels on a side
Scene = tuple[tuple[int, int, int], ...]  # (colour, shape, place) of each object, places ascending


def is_held_out(colour: int, shape: int, place: int) -> bool:
    """One colour for each shape at each place."""
    return (colour + 2 * shape + place) % 6 == 0


def make_scenes(count: int, *, held_out: bool, seed: int) -> list[Scene]:
    """Scenes of which all objects are held-out combinations, or none is; no two have the same caption."""
    rng = np.random.default_rng(seed)
    kinds = list(itertools.product(range(len(COLOURS)), range(len(SHAPES))))
    fitting = [[kind for kind in kinds if is_held_out(*kind, place) == held_out] for place in range(len(PLACES))]
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        places = np.sort(rng.choice(len(PLACES), rng.integers(1, 3), replace=False)).tolist()
        scenes[tuple((*fitting[place][rng.integers(len(fitting[place]))], place) for place in places)] = None
    return list(scenes)


def caption(scene: Scene) -> str:
    """The words for a scene."""
    return " and ".join(" ".join((list(COLOURS)[c], SHAPES[s], *PLACES[place])) for c, s, place in scene)


def tokens(scenes: Sequence[Scene]) -> Tensor:
    """Captions as int64 [scenes, LENGTH]: start, words, end, padding."""
    rows = [[START, *(WORDS.index(word) for word in caption(scene).split()), END] for scene in scenes]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


def render(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Pictures, float [scenes, 3, SIZE, SIZE] in 0 to 1; exact place, size, turn, paint and noise vary by chance."""
    rng = np.random.default_rng(seed)
    pictures = rng.uniform(0.1, 0.4, (len(scenes), 1, 1, 1)) + rng.normal(0, 0.03, (len(scenes), 3, SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for number, scene in enumerate(scenes):
        for colour, shape, place in scene:
            row, column = (np.array(divmod(place, 3)) + 0.5) * SIZE / 3 + rng.uniform(-1, 1, 2)
            radius, angle = rng.uniform(3.8, 5.4), rng.uniform(-0.3, 0.3)
            right = (x - column) * math.cos(angle) + (y - row) * math.sin(angle)
            down = (y - row) * math.cos(angle) - (x - column) * math.sin(angle)
            covered = np.clip(0.5 - _outside(SHAPES[shape], right, down, radius), 0, 1)
            paint = np.array(list(COLOURS.values())[colour]) + rng.normal(0, 0.04, 3)
            pictures[number] += covered * (paint[:, None, None] - pictures[number])
    return torch.from_numpy(pictures.clip(0, 1).astype(np.float32))


def _outside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the edge of a shape, negative inside."""
    if shape in ("circle", "ring"):
        distance = np.hypot(x, y)
        return distance - radius if shape == "circle" else abs(distance - 0.75 * radius) - 0.27 * radius
    if shape == "triangle":
        return np.maximum(math.sqrt(0.75) * abs(x) - y / 2, y) - 0.55 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * radius
    return np.maximum(np.maximum(abs(x), abs(y)) - radius, np.minimum(abs(x), abs(y)) - 0.3 * radius)


@functools.cache
def data(pictures: int, asked: int) -> dict[str, tuple[list[Scene], Tensor, Tensor]]:
    """Scenes, pictures and words: to train on, to choose settings by (other pictures of the same kind), held out."""
    wanted = {"train": (pictures, False), "validation": (asked, False), "held_out": (asked, True)}
    scenes = {part: make_scenes(n, held_out=out, seed=i) for i, (part, (n, out)) in enumerate(wanted.items())}
    return {part: (found, render(found, i), tokens(found)) for i, (part, found) in enumerate(scenes.items())}


def entrant(train: Callable[..., dict[str, Any]], starts: dict[str, Any], trials: int, seeds: int, name: str) -> Any:
    """Search an optimizer's settings on seed 0 by validation loss, as `sophia compare` does; then fresh seeds."""
    (lr, others, options), losses = starts[name], {}
    rule = {"lr": lr, "others": settings(**others), "options": options, "trials": trials, "factor": 2.0}
    while not (found := search(**rule, loss_of=losses.get)).done:
        for one in (candidate.settings for candidate in found.candidates if candidate.loss is None):
            losses[one] = train(name, dict(one), 0)["validation_loss"][-1]
            print(f"{name} {dict(one)}: validation loss {losses[one]:.4f}", flush=True)
    if found.best is None:
        raise SystemExit(f"{name}: every run of the search diverged: begin it at a lower learning rate")
    tried = [{**dict(one.settings), "validation_loss": one.loss} for one in found.candidates]
    runs = [train(name, dict(found.best), seed) for seed in range(1, seeds + 1)]
    return {"trials": tried, "best": dict(found.best), "not_settled": found.edges, "runs": runs}


def verdict(what: str, found: dict[str, Any]) -> str:
    """A sentence on the shares of right answers: their difference over pairs of equal seed, with its 95 % interval."""
    adamw, sophia = ({run["seed"]: 100 * run["right"] for run in found[name]["runs"]} for name in ("AdamW", "Sophia-G"))
    gap = difference(sophia, adamw)
    winner = "no difference shown" if gap.holds(0) else f"{'Sophia-G' if gap.value > 0 else 'AdamW'} is ahead"
    means = f"Sophia-G {np.mean(list(sophia.values())):.1f} %, AdamW {np.mean(list(adamw.values())):.1f} %"
    return f"{what}: {means}; {gap.value:+.1f} points (95 % interval {gap.low:+.1f} to {gap.high:+.1f}): {winner}"
