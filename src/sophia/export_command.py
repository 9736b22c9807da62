"""`sophia export`: a trained model as a folder for Hugging Face's `transformers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from sophia.export import check_possible, export_model
from sophia.run import load_run


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of `sophia export`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: Path
    """Folder to create; transformers' AutoModelForCausalLM and AutoTokenizer load it."""
    checkpoint: int | Literal["latest"] = "latest"
    """Step of the checkpoint."""
    check: bool = True
    """Load the folder with transformers and compare logits and tokens before it gets its name."""
    overwrite: bool = False
    """Replace the folder where it is an exported model already."""


def export(settings: Annotated[ExportSettings, tyro.conf.arg(name="")]) -> None:
    """Write a trained model as a GPT-2 folder that transformers loads, checked."""
    check_possible(settings.out, overwrite=settings.overwrite, check=settings.check)
    with Console().status("exporting"):
        run = load_run(settings.run, settings.checkpoint)
        check = export_model(
            run.model,
            run.tokenizer,
            settings.out,
            end_of_text=run.end_of_text,
            overwrite=settings.overwrite,
            check=settings.check,
        )
    size = run.model.num_parameters / 1e6
    print(f"step {run.step}, {size:.2f} M parameters, written to {settings.out}")
    if check is None:
        print("not checked against transformers, as --no-check said")
    else:
        print(
            f"transformers gives the same logits at {check.tokens} random tokens: largest difference "
            f"{check.max_difference:.1e}, allowed {check.tolerance:.1e}"
        )
