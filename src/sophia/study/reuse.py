"""Runs that another study has made already: the same settings, batches, seed and rules give the same run."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia.study import lock
from sophia.study.ledger import Ledger
from sophia.study.plan import plan
from sophia.study.runs import RunSpec
from sophia.study.settings import Study

# What decides how a run goes, beside its own settings, batch, steps and seed. Budgets, seeds and trials only decide
# which runs are wanted.
_OF_RUNS = ("schedule", "warmup_fraction", "final_lr_fraction", "max_grad_norm", "evaluations", "eval_windows")


class Loan:
    """The finished runs of another study, as far as this one wants them."""

    def __init__(self, study: Study, ledger: Ledger, held: lock.Lock, other: Path) -> None:
        """Look whether runs of the other study can stand beside this one's.

        Args:
            study: What is wanted.
            ledger: Takes the runs.
            held: This study's lock.
            other: Folder of the other study; nothing in it is changed.

        Raises:
            ValueError: It holds no finished run, or its text, model, machine or rules are not this study's.
        """
        self._study, self._ledger = study, ledger
        self._theirs = Ledger(other, mend=False).runs
        if not self._theirs:
            raise ValueError(f"reuse is {other}, which holds no finished run: give the --out folder of a study")
        lent = lock.read(other)
        if lent.data != held.data:
            raise ValueError(
                f"reuse is {other}, a study of other data (its fingerprint begins with {lent.data[:12]}, this one's "
                f"with {held.data[:12]}): its runs cannot stand beside this study's"
            )
        for key, (then, now) in lock.differences(_rules(lent.frozen), _rules(held.frozen)).items():
            raise ValueError(
                f"reuse is {other}, where {key} is {lock.shown(then)} and here {lock.shown(now)}: its runs cannot "
                "stand beside this study's"
            )

    def take(self, begun: Collection[str] = ()) -> Sequence[RunSpec]:
        """Write down what is wanted now; returns that.

        A search goes from trial to trial, so what is wanted is asked anew until the other study has nothing of it.

        Args:
            begun: ids of runs that are being made already.
        """
        taken: list[RunSpec] = []
        while found := [spec for spec in plan(self._study, self._ledger.runs).wanted if self._lends(spec, begun)]:
            for spec in found:
                self._ledger.append(self._theirs[spec.id])
            taken += found
        return taken

    def _lends(self, spec: RunSpec, begun: Collection[str]) -> bool:
        return spec.id in self._theirs and spec.id not in begun


def _rules(frozen: Mapping[str, Any]) -> dict[str, Any]:
    race = frozen.get("race", {})
    return {
        "model": frozen.get("model", {}),
        "machine": frozen.get("machine", {}),
        "race": {key: race[key] for key in _OF_RUNS if key in race},
    }
