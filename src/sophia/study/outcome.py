"""What a study leaves in its folder: results.json, the report, and a copy of its file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sophia import machine
from sophia.accounting import count_parameters
from sophia.distributed import World
from sophia.resolve import model_config, resolve
from sophia.study import read, results, timing
from sophia.study.evidence import planned
from sophia.study.ledger import Ledger
from sophia.study.measured import Cost
from sophia.study.one_run import train_settings
from sophia.study.plan import Plan
from sophia.study.settings import Study
from sophia.study.text import StudyText

RESULTS = "results.json"
STUDY = "study.toml"


def study_file(path: Path | None) -> str:
    """The study file word for word; the built-in one's where there is none."""
    return (path or read.DEFAULT).read_text(encoding="utf-8")


def write(
    study: Study,
    plan: Plan,
    ledger: Ledger,
    costs: Sequence[Cost],
    *,
    file: str,
    text: StudyText,
    committed: bool | None,
    out: Path,
) -> tuple[dict[str, Any], list[Path]]:
    """Write results and report.

    Returns:
        The content of results.json, and all paths that were written.

    Raises:
        ValueError: The runs are not comparable.
        OSError: Something cannot be written.
    """
    settings = resolve(
        train_settings(study, planned(plan)[0], data=text.dataset.folder, out=None),
        text.dataset,
        World(rank=0, size=1, device=torch.device("cpu")),
    )
    config = model_config(settings, text.dataset)
    context = results.StudyContext(
        file=file,
        file_sha256=hashlib.sha256(file.encode()).hexdigest(),
        committed=committed,
        fingerprint=text.dataset.fingerprint,
        text=text.origin,
        text_sha256=text.sha256,
        machine=_machine(out),
        parameters=count_parameters(config).total,
        vocab_size=text.dataset.vocab_size,
        context=config.context,
    )
    found = results.build(study, plan, ledger.runs, costs, context)
    path = out / RESULTS
    machine.write_json(path, found)

    from sophia import report  # noqa: PLC0415 - what draws is loaded when there is something to draw

    return found, [path, *report.write(found, out)]


def _machine(out: Path) -> Mapping[str, Any]:
    """Where the timing was made; this machine before that."""
    path = out / timing.FILE
    if path.exists():
        described: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["machine"]
        return described
    return machine.describe()
