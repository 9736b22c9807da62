"""A character-level transformer in a loop of one's own: AdamW's loop, and one new line.

    python examples/plain_loop.py --out plain-out

The text comes with Python. It ends in plain-loop.png, the loss and the share of clipped coordinates against steps, and
in a page that the model wrote. Needs torch and matplotlib. --quick is for tests.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG
from sophia.data.builtin import builtin_documents

WIDTH, HEADS, LAYERS, CONTEXT, VOCAB = 96, 4, 3, 96, 128


class Block(nn.Module):
    """Causal attention, and a layer for each position on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[rows, length, WIDTH] -> the same shape."""
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [rows, HEADS, length, WIDTH / HEADS]
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Characters [rows, length] -> logits of the next ones [rows, length, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        """The logits."""
        places = torch.arange(characters.shape[1], device=characters.device)
        return self.head(self.norm(self.blocks(self.characters(characters) + self.places(places))))


@torch.no_grad()
def sample(model: nn.Module, length: int, prompt: str = "The ") -> str:
    """A text that the model goes on with, character by character."""
    written = torch.tensor([list(prompt.encode("ascii"))])
    for _ in range(length):
        probabilities = (model(written[:, -CONTEXT:])[:, -1] / 0.7).softmax(-1)
        written = torch.cat((written, torch.multinomial(probabilities, 1)), dim=1)
    return bytes(written[0].tolist()).decode("ascii")


def draw(losses: list[float], shares: list[float], path: Path) -> None:
    """Loss and clipped share against steps; the band is where gamma is right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, share = figure.subplots(1, 2)
    loss.plot(losses, color="#bbb", linewidth=0.8)
    window = max(len(losses) // 20, 1)
    means = torch.tensor(losses).unfold(0, window, 1).mean(1)
    loss.plot(range(window - 1, len(losses)), means, color="#1f4e9c")
    loss.set(xlabel="steps", ylabel="training loss (nats a character)")
    share.plot(shares, color="#1f4e9c")
    share.axhspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
    share.set(xlabel="steps", ylabel="clipped coordinates", ylim=(0, 1.03))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("plain-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    steps, batch, characters = (6, 4, 100_000) if args.quick else (500, 24, 1_000_000)
    text = "".join(document.text for document in builtin_documents(characters)).encode("ascii", "ignore")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    torch.manual_seed(0)
    model = Transformer()
    optimizer = SophiaG(model.parameters(), lr=2e-3, betas=(0.9, 0.99), gamma=0.5, weight_decay=0.2)
    warmup = steps // 10 + 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    losses, shares = [], []
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (batch, 1))
        rows = data[starts + torch.arange(CONTEXT + 1)]
        inputs, targets = rows[:, :-1], rows[:, 1:]
        optimizer.refresh_curvature(lambda inputs=inputs: model(inputs[:8]))  # THE NEW LINE: acts on every tenth step
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        shares.append(optimizer.stats()["clip_fraction"].item())
        if step % (steps // 5) == 0:
            print(f"step {step}: loss {losses[-1]:.2f}, {shares[-1]:.0%} of the coordinates clipped", flush=True)
    draw(losses, shares, args.out / "plain-loop.png")
    (args.out / "sample.txt").write_text(page := sample(model, 20 if args.quick else 500), encoding="ascii")
    print(f"loss {sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :]):.2f} at the end\n{page}")


if __name__ == "__main__":
    main()
