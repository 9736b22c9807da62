"""The table of what an update costs."""

from sophia.report import numbers
from sophia.report.markup import Column, Markup, table, tag
from sophia.report.parts import missing, speedups
from sophia.report.reading import Record, Results, estimate, part, records


def costs(results: Results) -> Markup:
    """What an update costs."""
    rows = []
    for name, entry in results.entries.items():
        cost = part(entry, "cost")
        if cost:
            rows.append((tag("span", name, class_="plain"), *_cost_cells(cost)))
    for ablation in records(results.record, "ablations"):
        cost = part(ablation, "cost")
        if cost:
            rows.append((f"{ablation.get('of')}: {ablation.get('name')}", *_cost_cells(cost)))
    if not rows:
        return missing("Updates have not been timed yet.")
    columns = (
        Column("Optimizer"),
        Column("Time a step", numeric=True),
        Column(f"Times {results.baseline}", numeric=True),
        Column("Operations a step", numeric=True),
        Column("Peak memory", numeric=True),
    )
    caption = (
        "Cost of an update, curvature and hooks included, compilation and evaluation left out. All optimizers are "
        "timed in turn, round by round, so that a busy machine slows all alike; in parentheses the median's "
        "95 % interval."
    )
    return table(caption, columns, rows, label="Cost of an update")


def _cost_cells(cost: Record) -> tuple[object, ...]:
    ratio = estimate(
        {"ratio": {"value": cost.get("ratio"), "low": cost.get("ratio_low"), "high": cost.get("ratio_high")}}, "ratio"
    )
    return (
        numbers.seconds(cost.get("seconds_per_step")),
        speedups(ratio),
        numbers.operations(cost.get("flops_per_step")),
        numbers.memory(cost.get("peak_memory_bytes")),
    )
