"""A study without training: runs end at once, with the loss that a function of their settings gives."""

from collections.abc import Callable, Sequence

from sophia.study.plan import plan
from sophia.study.runs import Evidence, FinishedRun, Point, RunSpec
from sophia.study.settings import Study

LossOf = Callable[[RunSpec], float | None]


def finish(spec: RunSpec, loss: float | None) -> FinishedRun:
    """A run that came to its end with this loss; None: that diverged."""
    curve = (Point(step=0, tokens=0, val_loss=7.0), Point(step=spec.steps, tokens=spec.tokens, val_loss=loss))
    interval = int(str(dict(spec.settings).get("curvature_interval", 10)))
    evidence = Evidence(
        weights=f"weights {spec.seed}",
        batches=f"batches {spec.seed} {spec.tokens_per_step}",
        validation="validation",
        last_lr_factor=0.05,
        refreshes=-(-spec.steps // interval) if spec.kind.startswith("sophia") else None,
        conditions={"device": "cpu", "precision": "fp32", "compile": False, "threads": 1},
    )
    return FinishedRun(
        spec=spec,
        val_loss=loss,
        curve=curve,
        seconds=spec.steps * 0.1,
        evidence=None if loss is None else evidence,
        date="2026-01-01",
    )


def simulate(
    study: Study,
    loss_of: LossOf,
    *,
    finished: dict[str, FinishedRun] | None = None,
    workers: int = 2,
    most: int = 10_000,
) -> dict[str, FinishedRun]:
    """Run a study to its end, or until so many runs are finished.

    Args:
        study: What to run.
        loss_of: Of a run; None: it diverges.
        finished: Runs from before, by id; not changed.
        workers: Runs at once; the most urgent ones start, and the first of them ends first.
        most: Runs after which to stop.

    Returns:
        Finished runs by id, in the order in which they ended.
    """
    done = dict(finished or {})
    running: list[RunSpec] = []
    while len(done) < most:
        wanted = plan(study, done).wanted
        for spec in wanted:
            if len(running) < workers and spec not in running:
                running.append(spec)
        if not running:
            break
        spec = running.pop(0)
        done[spec.id] = finish(spec, loss_of(spec))
    return done


def order(finished: dict[str, FinishedRun]) -> Sequence[RunSpec]:
    """What was run, in its order."""
    return [run.spec for run in finished.values()]
