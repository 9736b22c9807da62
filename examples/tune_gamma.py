"""Gamma by the clipped share, in a loop of one's own: left alone, turned by hand, and set by itself.

    python examples/tune_gamma.py --out gamma-out

Three runs of one small model, with the same weights and batches: a gamma far too small, left alone; the same, turned
while it trains by the table of docs/optimizer.md; and gamma="auto". It ends in tune-gamma.png: the clipped share,
gamma, and the loss against steps. Needs torch and matplotlib. --quick is for tests.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG
from sophia.data.builtin import builtin_documents

CONTEXT, CHARACTERS, WIDTH = 64, 128, 96
TOO_SMALL = 0.003
RUNS = {"left alone": "#999999", "by hand": "#c44e00", "auto": "#1f4e9c"}


class Network(nn.Module):
    """Characters [rows, length] -> logits of the next ones [rows, length, CHARACTERS]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(CHARACTERS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.recurrent(self.embed(characters))[0])


def turned(gamma: float, share: float) -> float:
    """The table's advice: nearly all clipped, raise it; small steps nearly everywhere, lower it."""
    if share > 0.9:
        return gamma * 3
    return gamma / 2 if share < 0.5 else gamma


def train(way: str, data: Tensor, steps: int, look_every: int) -> list[tuple[float, float, float]]:
    """One run: loss, clipped share and gamma at every step."""
    torch.manual_seed(0)  # of weights and batches: the same in all runs
    model, seen = Network(), []
    # With bias correction the curvature is whole from the first estimate on, and the share means something at once;
    # without, look at it after a hundred steps at the earliest.
    settings = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "bias_correction": True}
    gamma = "auto" if way == "auto" else TOO_SMALL
    optimizer = SophiaG(model.parameters(), gamma=gamma, **settings).attach(model)
    for step in range(steps):
        rows = data[torch.randint(len(data), (24,))]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        share, group = optimizer.stats()["clip_fraction"].item(), optimizer.param_groups[0]
        seen.append((loss.item(), share, group["gamma"]))
        if way == "by hand" and (step + 1) % look_every == 0:
            group["gamma"] = turned(group["gamma"], share)
    return seen


def draw(runs: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """Clipped share, gamma and loss (a running mean) against steps; the band is where gamma is right."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    share, gamma, loss = figure.subplots(1, 3)
    for way, seen in runs.items():
        losses, shares, gammas = torch.tensor(seen).T
        window = max(len(seen) // 20, 1)
        share.plot(shares, color=RUNS[way], label=way)
        gamma.plot(gammas, color=RUNS[way])
        loss.plot(range(window - 1, len(seen)), losses.unfold(0, window, 1).mean(1), color=RUNS[way])
    share.axhspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
    share.yaxis.set_major_formatter(PercentFormatter(1))
    share.set(xlabel="steps", ylabel="clipped coordinates", ylim=(0, 1.03))
    gamma.set(xlabel="steps", ylabel="gamma", yscale="log")
    loss.set(xlabel="steps", ylabel="training loss (nats a character)")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train three times, draw, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gamma-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    steps, look_every = (12, 2) if args.quick else (400, 20)
    text = "".join(document.text for document in builtin_documents(1_200_000)).encode("ascii", "ignore")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, CONTEXT)
    runs = {}
    for way in RUNS:
        runs[way] = train(way, data, steps, look_every)
        losses, shares, gammas = torch.tensor(runs[way][-max(steps // 20, 1) :]).T
        print(f"{way}: gamma {gammas[-1]:.3g}, {shares.mean():.0%} clipped, loss {losses.mean():.2f}", flush=True)
    draw(runs, args.out / "tune-gamma.png")


if __name__ == "__main__":
    main()
