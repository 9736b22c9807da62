"""results.json: everything that a study found, finished or not, in the one form that the report reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sophia.study.measured import Cost
from sophia.study.plan import Plan
from sophia.study.runs import FinishedRun
from sophia.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """What the results say about a study beside its settings and runs."""

    file: str
    """The study file, word for word."""
    file_sha256: str
    """Of that file."""
    committed: bool | None
    """Whether the file was in git, unchanged, when the first run under test started; None: no such run yet, or no
    repository."""
    fingerprint: str
    """Of the prepared data: tokens, tokenizer and split."""
    text: str
    """Where the text comes from."""
    text_sha256: str
    """Of the text; empty for builtin text, which has its fingerprint."""
    machine: Mapping[str, Any]
    """`machine.describe()`, with the conditions that all runs share."""
    parameters: int
    """Numbers of the model that training adjusts."""
    vocab_size: int
    """Token ids of the data."""
    context: int
    """Tokens in a sequence."""


def build(
    study: Study,
    plan: Plan,
    finished: Mapping[str, FinishedRun],
    costs: Sequence[Cost],
    context: StudyContext,
) -> dict[str, Any]:
    """The content of results.json: plain values only; what is not known yet is None.

    Args:
        study: The settings.
        plan: What `plan.plan` says about these runs.
        finished: By `RunSpec.id`.
        costs: One for each entry and ablation that was timed, the baseline among them; may be empty.
        context: What else the results say.

    Raises:
        ValueError: Runs or timings are not comparable; the message names them.
    """
    raise NotImplementedError
