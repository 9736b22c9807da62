"""Hugging Face's stock Trainer: name the optimizer, add one callback.

    python examples/hf_trainer.py --out trainer-out

A small GPT-2, built from its configuration, learns the bytes of the text that comes with Python. It ends in
trainer.png, the loss and the clipped share that the callback adds to the Trainer's log, and in a text that the model
wrote. Needs the extras `hf` and `examples`. --quick is for tests.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from sophia import SophiaG
from sophia.data.builtin import builtin_documents
from sophia.integrations.transformers import SophiaCallback

CONTEXT, BYTES = 128, 256


def sentences(max_bytes: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of CONTEXT bytes, as the Trainer wants them; the model moves the labels along by itself."""
    text = "".join(document.text for document in builtin_documents(max_bytes)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": piece, "labels": piece} for piece in data.split(CONTEXT) if len(piece) == CONTEXT]


def draw(log: list[dict[str, float]], path: Path) -> None:
    """Loss and clipped share against steps; the band is where gamma is right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, share = figure.subplots(1, 2)
    steps = [line["step"] for line in log]
    loss.plot(steps, [line["loss"] for line in log], color="#1f4e9c")
    loss.set(xlabel="steps", ylabel="training loss (nats a byte)")
    share.plot(steps, [line["clip_fraction"] for line in log], color="#1f4e9c")
    share.axhspan(0.5, 0.9, color="#2e7d32", alpha=0.1)
    share.set(xlabel="steps", ylabel="clipped coordinates", ylim=(0, 1.03))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("trainer-out"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {args.out}: {problem.strerror}; name a folder that can be made")
    steps, batch, layers = (4, 2, 1) if args.quick else (600, 16, 2)
    set_seed(0)
    shape = {"vocab_size": BYTES, "n_positions": CONTEXT, "n_embd": 96, "n_layer": layers, "n_head": 4}
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)  # no byte is seen twice
    model = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, initializer_range=0.1, bos_token_id=0, eos_token_id=0))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            weight_decay=0.2,  # the Trainer's own counts, not the optimizer's
            warmup_steps=steps // 10,
            logging_steps=max(steps // 30, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=sentences(100_000 if args.quick else 1_000_000),
        optimizer_cls_and_kwargs=(SophiaG, {"lr": 5e-3, "betas": (0.9, 0.99), "gamma": 0.5}),
        callbacks=[SophiaCallback()],  # the one new line
    )
    trainer.train()
    draw([line for line in trainer.state.log_history if "loss" in line], args.out / "trainer.png")
    prompt = torch.tensor([list(b"The ")], device=model.device)
    length = 10 if args.quick else CONTEXT - prompt.shape[1]
    settings = {"do_sample": True, "temperature": 0.7, "max_new_tokens": length, "pad_token_id": 0}
    written = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    (args.out / "sample.txt").write_bytes(page := bytes(written[0].tolist()))
    print(page.decode(errors="replace"))


if __name__ == "__main__":
    main()
