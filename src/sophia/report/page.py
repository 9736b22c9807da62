"""The page as a whole, and the files that are written."""

import importlib.resources
from pathlib import Path
from typing import Any

from sophia.report import bars, costs, findings, origin, searches, summary
from sophia.report.budgets import budgets
from sophia.report.curves import clip_curves, loss_curves
from sophia.report.looks import looks, variables
from sophia.report.markup import Markup, join, tag
from sophia.report.parts import figure, section
from sophia.report.picture import Picture, save_png
from sophia.report.rates import rates
from sophia.report.reading import Results

_CONTENTS = (
    ("race", "Losses and speed-ups"),
    ("budgets", "How the speed-up is read off"),
    ("curves", "Loss over training"),
    ("paper", "The paper's own test"),
    ("batch", "Each at its best batch"),
    ("cost", "What an update costs"),
    ("search", "The search"),
    ("clipping", "Clipping"),
    ("ablations", "Ablations"),
    ("trials", "All trials and runs"),
    ("origin", "Conditions and machine"),
    ("reproduce", "Reproduce"),
)


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the report of a study into a folder.

    Args:
        results: The content of results.json. Any part may be missing or None: the page then says what is not there yet.
        out: The folder, which is made where there is none.

    Returns:
        report.html, then the PNG of each figure.

    Raises:
        OSError: Something cannot be written.
    """
    found = Results(results)
    pictures = draw(found)
    text = page(found, pictures)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return [path] + [save_png(picture, out / f"{picture.name}.png") for picture in pictures.values() if picture]


def draw(results: Results) -> dict[str, Picture | None]:
    """The report's figures; None for one that has nothing to show yet."""
    drawn = looks(list(results.entries), results.baseline, results.headline)
    return {
        "speedups": bars.speedups(results, drawn),
        "budgets": budgets(results, drawn),
        "curves": loss_curves(results, drawn),
        "rates": rates(results, drawn),
        "clipped": clip_curves(results, drawn),
        "ablations": bars.ablations(results),
    }


def page(results: Results, pictures: dict[str, Picture | None]) -> str:
    """The page as text."""
    css = importlib.resources.files("sophia.report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{results.study.get('name') or 'A study of optimizers'} – a fair race between optimizers"
    contents = tag("ul", *(tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name in _CONTENTS))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(variables() + css)),
    )
    body = tag(
        "body",
        summary.head(results),
        summary.flags(results),
        tag("nav", contents, aria_label="Contents"),
        tag("main", _sections(results, pictures)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _sections(results: Results, pictures: dict[str, Picture | None]) -> Markup:
    content: dict[str, tuple[object, ...]] = {
        "race": (
            findings.race(results),
            findings.duels(results),
            figure(
                pictures["speedups"],
                "Speed-ups are not known yet: they need final runs at T, and the baseline's at several budgets.",
            ),
        ),
        "budgets": (
            figure(pictures["budgets"], "The baseline has no final runs at two budgets yet."),
            findings.baseline_budgets(results),
        ),
        "curves": (figure(pictures["curves"], "No final run has finished yet."),),
        "paper": (findings.paper_test(results),),
        "batch": (findings.best_batch(results),),
        "cost": (costs.costs(results),),
        "search": (
            figure(pictures["rates"], "No trial at budget T has finished yet."),
            searches.best_settings(results),
        ),
        "clipping": (figure(pictures["clipped"], "No optimizer that clips has final runs."),),
        "ablations": (figure(pictures["ablations"]), findings.ablations(results)),
        "trials": (searches.all_trials(results), searches.all_runs(results)),
        "origin": (origin.conditions(results), tag("h3", "Machine and versions"), origin.machine(results)),
        "reproduce": (
            tag("h3", "The study file"),
            origin.study_file(results),
            tag("h3", "How"),
            origin.reproduce(results),
        ),
    }
    return join(section(anchor, title, *content[anchor]) for anchor, title in _CONTENTS)
