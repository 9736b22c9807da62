"""Lightning: return the optimizer, give the Trainer one callback; automatic optimization stays on.

    python examples/lightning_module.py --out lightning-out

A recurrent network learns the characters of the text that comes with Python. It ends in lightning.png, the loss and the
share of clipped coordinates against steps. Needs the extras `lightning` and `examples`. --quick is for tests.
"""

import argparse
import warnings
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sophia import SophiaG
from sophia.data.builtin import builtin_documents
from sophia.integrations.lightning import SophiaCallback

CONTEXT, CHARACTERS, WIDTH = 64, 128, 128


class Network(nn.Module):
    """Characters [rows, length] -> logits of the next ones [rows, length, CHARACTERS]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(CHARACTERS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.recurrent(self.embed(characters))[0])


class LanguageModel(L.LightningModule):
    """As for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = Network(), []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of a batch [rows, CONTEXT + 1]."""
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> SophiaG:
        """The optimizer."""
        return SophiaG(self.parameters(), lr=3e-3, betas=(0.9, 0.99), gamma=0.5, weight_decay=0.1)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Tensor, batch_idx: int) -> None:
        """Keep what is drawn at the end."""
        share = self.trainer.optimizers[0].stats()["clip_fraction"]
        self.seen.append((self.global_step, outputs["loss"].item(), share.item()))


def draw(seen: list[tuple[int, float, float]], path: Path) -> None:
    """Loss and clipped share against steps; the band is where gamma is right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, share = figure.subplots(1, 2)
    steps, losses, shares = zip(*seen, strict=True)
    loss.plot(steps, losses, color="#1f4e9c", linewidth=0.9)
    loss.set(xlabel="steps", ylabel="training loss (nats a character)")
    share.plot(steps, shares, color="#1f4e9c")
    share.axhspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
    share.set(xlabel="steps", ylabel="clipped coordinates", ylim=(0, 1.03))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lightning-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    steps, batch = (4, 4) if args.quick else (400, 32)
    L.seed_everything(0, verbose=False)
    text = "".join(document.text for document in builtin_documents(1_200_000)).encode("ascii", "ignore")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, CONTEXT)
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the text is in memory
    module = LanguageModel()
    trainer = L.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[SophiaCallback()],  # the one new line
        default_root_dir=args.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=batch, shuffle=True))
    draw(module.seen, args.out / "lightning.png")
    _, loss, share = module.seen[-1]
    print(f"loss {module.seen[0][1]:.2f} -> {loss:.2f}, {share:.0%} of the coordinates clipped at the end")


if __name__ == "__main__":
    main()
