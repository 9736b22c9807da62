"""Whether what a study names by import path is there: asked before the first run, not hours later at its turn."""

from dataclasses import replace

from sophia.foreign import constructor, load_hook
from sophia.study import check
from sophia.study.settings import Study


def imports(study: Study) -> None:
    """Load the classes and hooks of all entries, and look whether their constructors take what the study will give.

    Raises:
        ValueError: Something is missing, or does not take a setting; the entry or ablation is named.
    """
    race = replace(study.race, other_batches=())  # the reader has looked at those, where an entry runs there
    for entry in study.optimizers:
        searched = [({name: value}, f"optimizer {entry.name}: search") for name, row in entry.search for value in row]
        ablated = [(dict(one.settings), f"ablation {one.name}") for one in study.ablations if one.of == entry.name]
        for changes, where in [({}, f"optimizer {entry.name}"), *searched, *ablated]:
            wanted = check.refuse(entry, race, study.model, changes, where)
            try:
                if wanted.hook:
                    load_hook(wanted.hook)
                if ":" in wanted.optimizer:
                    constructor(wanted)
            except ValueError as problem:
                raise ValueError(f"{where}: {problem}") from None
