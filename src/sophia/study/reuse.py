"""Runs that another study has made already: the same settings, batches, seed and rules give the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia.study import lock
from sophia.study.ledger import Ledger
from sophia.study.plan import plan
from sophia.study.settings import Study

# What decides how a run goes, beside its own settings, batch, steps and seed. Budgets, seeds and trials only decide
# which runs are wanted.
_OF_RUNS = ("schedule", "warmup_fraction", "final_lr_fraction", "max_grad_norm", "evaluations", "eval_windows")


def reuse(study: Study, ledger: Ledger, held: lock.Lock, other: Path) -> int:
    """Write down those finished runs of another study that this one wants.

    A search goes from trial to trial, so what is wanted is asked anew until the other study has nothing of it.

    Args:
        study: What is wanted.
        ledger: Takes them.
        held: This study's lock.
        other: Folder of the other study; nothing in it is changed.

    Returns:
        How many.

    Raises:
        ValueError: It holds no finished run, or its text, model, machine or rules are not this study's.
    """
    theirs = Ledger(other, mend=False)
    if not theirs.runs:
        raise ValueError(f"reuse is {other}, which holds no finished run: give the --out folder of a study")
    lent = lock.read(other)
    if lent.data != held.data:
        raise ValueError(
            f"reuse is {other}, a study of other data (its fingerprint begins with {lent.data[:12]}, this one's with "
            f"{held.data[:12]}): its runs cannot stand beside this study's"
        )
    for key, (then, now) in lock.differences(_rules(lent.frozen), _rules(held.frozen)).items():
        raise ValueError(
            f"reuse is {other}, where {key} is {lock.shown(then)} and here {lock.shown(now)}: its runs cannot stand "
            "beside this study's"
        )
    taken = 0
    while found := [theirs.runs[spec.id] for spec in plan(study, ledger.runs).wanted if spec.id in theirs.runs]:
        for run in found:
            ledger.append(run)
        taken += len(found)
    return taken


def _rules(frozen: Mapping[str, Any]) -> dict[str, Any]:
    race = frozen.get("race", {})
    return {
        "model": frozen.get("model", {}),
        "machine": frozen.get("machine", {}),
        "race": {key: race[key] for key in _OF_RUNS if key in race},
    }
