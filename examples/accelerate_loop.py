"""A loop of Accelerate: one line after `prepare`; with accumulation, clipping and a schedule.

    python examples/accelerate_loop.py --out accelerate-out
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --out accelerate-out

A recurrent network learns the characters of the text that comes with Python. It ends in accelerate.png, the loss and
the share of clipped coordinates against steps. Needs the extras `hf` and `examples`. --quick is for tests.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sophia import SophiaG
from sophia.data.builtin import builtin_documents
from sophia.integrations.accelerate import attach

CONTEXT, CHARACTERS, WIDTH, ACCUMULATION = 64, 128, 128, 2


class Network(nn.Module):
    """Characters [rows, length] -> logits of the next ones [rows, length, CHARACTERS]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(CHARACTERS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.recurrent(self.embed(characters))[0])


def draw(losses: list[float], shares: list[float], path: Path) -> None:
    """Loss and clipped share against steps; the band is where gamma is right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, share = figure.subplots(1, 2)
    loss.plot(losses, color="#1f4e9c", linewidth=0.9)
    loss.set(xlabel="steps", ylabel="training loss (nats a character)")
    share.plot(shares, color="#1f4e9c")
    share.axhspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
    share.set(xlabel="steps", ylabel="clipped coordinates", ylim=(0, 1.03))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("accelerate-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    steps, batch = (4, 4) if args.quick else (300, 16)
    set_seed(0)
    text = "".join(document.text for document in builtin_documents(1_200_000)).encode("ascii", "ignore")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, CONTEXT)

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = Network()
    optimizer = SophiaG(model.parameters(), lr=3e-3, betas=(0.9, 0.99), gamma=0.5, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps * accelerator.num_processes)
    loader = DataLoader(data, batch_size=batch, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    attach(optimizer, model)  # the one new line

    losses, shares, parts = [], [], []
    for rows in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        parts.append(loss.detach())
        if accelerator.sync_gradients:
            losses.append(accelerator.reduce(torch.stack(parts).mean(), "mean").item())
            shares.append(optimizer.optimizer.stats()["clip_fraction"].item())  # what the wrapper hides
            parts.clear()
        if len(losses) == steps:
            break
    if accelerator.is_main_process:
        draw(losses, shares, args.out / "accelerate.png")
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {shares[-1]:.0%} of the coordinates clipped at the end")


if __name__ == "__main__":
    main()
