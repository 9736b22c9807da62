"""Where the numbers come from: text, machine, study file, and the commands that make them again."""

from sophia.report import numbers
from sophia.report.markup import Markup, tag
from sophia.report.parts import facts, listed, missing
from sophia.report.reading import Results, items, part

_COMMITTED = {
    True: "yes, unchanged when the first run under test started",
    False: "no: nothing outside this report shows that the study was fixed beforehand",
    None: "not known",
}


def conditions(results: Results) -> Markup:
    """What was equal for all."""
    study, model = results.study, part(results.study, "model")
    vocabulary = numbers.whole(model.get("vocab_size"))
    rest = {key: value for key, value in model.items() if key not in ("parameters", "vocab_size")}
    seeds = ", ".join(str(seed) for seed in items(study, "seeds")) or numbers.MISSING
    headline = ", ".join(str(seed) for seed in items(study, "headline_seeds"))
    budgets = ", ".join(numbers.budget(tokens, results.tokens) for tokens in items(study, "budgets"))
    factor = numbers.setting("factor", study.get("factor"))
    share = study.get("search_budget")
    shorter = "" if share in (None, 1.0) else f" at {numbers.budget(share * results.tokens, results.tokens)}"
    rule = (
        f"{numbers.whole(study.get('trials'))} trials each{shorter}, learning rates a factor of {factor} apart, seed "
        f"{study.get('search_seed', numbers.MISSING)}; at other budgets and batches "
        f"{numbers.whole(study.get('retrials'))} learning rates around the best"
    )
    return facts(
        [
            ("Text", study.get("text") or numbers.MISSING),
            ("SHA-256 of the text", study.get("text_sha256") or numbers.MISSING),
            ("Fingerprint of the tokens", study.get("fingerprint") or numbers.MISSING),
            (
                "Model",
                f"{numbers.count(model.get('parameters'))} parameters, vocabulary of {vocabulary}",
            ),
            ("Shape", listed(rest)),
            ("Context", f"{numbers.whole(study.get('context'))} tokens"),
            ("Batch", f"{numbers.whole(results.tokens_per_step)} tokens a step"),
            ("Budget T", f"{numbers.whole(results.tokens)} tokens, {numbers.whole(study.get('steps'))} steps"),
            ("Budgets", budgets or numbers.MISSING),
            ("Schedule", listed(part(study, "schedule"))),
            ("Seeds", seeds + (f"; {results.baseline} and {results.headline}: {headline}" if headline else "")),
            ("Search", rule),
        ]
    )


def machine(results: Results) -> Markup:
    """What it ran on."""
    found = part(results.record, "machine")
    if not found:
        return missing("The machine is not described.")
    return facts(
        (str(key).replace("_", " "), listed(value)) for key, value in found.items() if value not in (None, {}, [])
    )


def study_file(results: Results) -> Markup:
    """The file, word for word."""
    study = results.study
    committed = study.get("committed")
    about = facts(
        [
            ("SHA-256", study.get("file_sha256") or numbers.MISSING),
            ("Committed to git", _COMMITTED.get(committed if isinstance(committed, bool) else None, numbers.MISSING)),
        ]
    )
    text = study.get("file")
    if not text:
        return tag("div", about, missing("The study file is not in these results."))
    shown = tag("details", tag("summary", tag("strong", "study.toml")), tag("pre", tag("code", text), tabindex="0"))
    return tag("div", about, shown)


def reproduce(results: Results) -> Markup:
    """Commands."""
    version = part(results.record, "machine").get("sophia")
    commands = "sophia compare study.toml --out results"
    steps = [
        tag(
            "li",
            f"Install sophia {version or ''} with its extra: ".replace("  ", " "),
            tag("code", "pip install '.[study]'"),
            ".",
        ),
        tag("li", "Save the study file above as ", tag("code", "study.toml"), "."),
        tag(
            "li",
            "If it names a data folder, make that from the text above with ",
            tag("code", "sophia prepare"),
            "; its fingerprint must be the one above. Without a folder, data is made from text that the machine has.",
        ),
        tag(
            "li",
            "Run ",
            tag("code", commands),
            ". Stop it whenever you like: the same command goes on where it stopped.",
        ),
    ]
    return tag(
        "div",
        tag("ol", *steps),
        tag(
            "p",
            "Every number of this page is in ",
            tag("code", "results.json"),
            " beside it. Sophia's paper: ",
            tag("a", "arXiv 2305.14342", href="https://arxiv.org/abs/2305.14342"),
            ".",
        ),
    )
