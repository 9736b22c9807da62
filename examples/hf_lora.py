"""LoRA by peft: a model that learned Python's manual learns its sources, and only adapters move.

    python examples/hf_lora.py --out lora-out

A small GPT-2 is trained on the bytes of one text, then frozen, and adapters are trained on the other, both by Sophia-G
in the stock Trainer. It ends in lora.png, the loss on both texts before and after, and says how many weights moved.
Needs the extras `hf` and `examples`. --quick is for tests.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from sophia import SophiaG
from sophia.data.builtin import builtin_documents
from sophia.integrations.transformers import SophiaCallback

CONTEXT, BYTES = 128, 256


def texts() -> dict[str, tuple[list[dict[str, Tensor]], Tensor]]:
    """By name: pieces of CONTEXT bytes to train on, as the Trainer wants them, and others to test on."""
    documents = builtin_documents(1_200_000)
    manual = [document for document in documents if document.name.startswith("docs/")]
    manual = manual or documents[: len(documents) // 2]  # some Pythons come without: then both texts are sources
    found = {}
    for name, part in (("manual", manual), ("sources", documents[len(manual) :])):
        data = torch.frombuffer(bytearray("".join(one.text for one in part).encode()), dtype=torch.uint8).long()
        *pieces, _ = ({"input_ids": piece, "labels": piece} for piece in data.split(CONTEXT))  # the last is shorter
        found[name] = pieces[:-32], torch.stack([piece["labels"] for piece in pieces[-32:]])
    return found


def train(model: nn.Module, pieces: list[dict[str, Tensor]], lr: float, steps: int, folder: Path) -> None:
    """As for any model: peft's wrapper needs nothing more."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        weight_decay=0.2,
        warmup_steps=steps // 10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    optimizer = (SophiaG, {"lr": lr, "betas": (0.9, 0.99), "gamma": 0.5})
    trainer = Trainer(
        model, arguments, train_dataset=pieces, optimizer_cls_and_kwargs=optimizer, callbacks=[SophiaCallback()]
    )
    trainer.train()


@torch.no_grad()
def losses(model: nn.Module, found: dict[str, tuple[list[dict[str, Tensor]], Tensor]]) -> dict[str, float]:
    """On the pieces of both texts that were kept back, in nats a byte."""
    model.eval()
    rows = {name: held.to(model.device) for name, (_, held) in found.items()}
    return {name: model(input_ids=held, labels=held).loss.item() for name, held in rows.items()}


def draw(before: dict[str, float], after: dict[str, float], path: Path) -> None:
    """Loss on both texts, before and after."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (label, found, color) in enumerate((("before", before, "#bbb"), ("with adapters", after, "#1f4e9c"))):
        bars = axes.bar([row + 0.4 * place for row in range(2)], list(found.values()), 0.38, label=label, color=color)
        axes.bar_label(bars, fmt="%.2f")
    axes.set_xticks([0.2, 1.2], [f"the {name}" for name in before])
    axes.set(ylabel="loss (nats a byte)")
    axes.margins(y=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, adapt, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lora-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    steps = 3 if args.quick else 300
    set_seed(0)
    shape = {"vocab_size": BYTES, "n_positions": CONTEXT, "n_embd": 96, "n_layer": 1 if args.quick else 2, "n_head": 4}
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model, found = (
        GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, initializer_range=0.1, bos_token_id=0, eos_token_id=0)),
        texts(),
    )
    train(model, found["manual"][0], 5e-3, steps, args.out)
    before = losses(model, found)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    adapted = get_peft_model(model, config)
    weights = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    train(adapted, found["sources"][0], 5e-3, steps, args.out)
    after = losses(adapted, found)
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, weights[name])}
    for word, kind in (("frozen", False), ("adapters", True)):
        theirs = [name for name, p in adapted.named_parameters() if ("lora_" in name) is kind]
        total = sum(weights[name].numel() for name in theirs)
        print(f"{word}: {total} weights in {len(theirs)} tensors, {len(moved.intersection(theirs))} of which moved")
    print(", ".join(f"the {name}: {before[name]:.2f} -> {after[name]:.2f} nats a byte" for name in before))
    draw(before, after, args.out / "lora.png")


if __name__ == "__main__":
    main()
