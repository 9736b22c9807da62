"""An extension of griffe for how docstrings are written here.

Roles (`:class:`Sophia``) become links to what they name, where the reference has that. A "Returns:" whose lines begin
with names becomes a list.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth):`~?([^`]+)`")
RETURNS = re.compile(r"(?<=\nReturns:\n)(?: .*\n?)+")
NAMES = re.compile(r"^( {4})(\w+(?:, \w+)*): ", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """When all of the package is read, so that names of any module can be resolved."""
        self._replace(pkg, set())

    def _replace(self, thing: griffe.Object, seen: set[str]) -> None:
        if thing.path in seen:
            return
        seen.add(thing.path)
        if thing.docstring:
            text = RETURNS.sub(lambda lines: NAMES.sub(r"\1- `\2` – ", lines[0]), thing.docstring.value)
            thing.docstring.value = ROLE.sub(lambda match: _link(thing, match[1]), text)
        for member in thing.members.values():
            if not member.is_alias:
                self._replace(member, seen)


def _link(thing: griffe.Object, name: str) -> str:
    first, _, rest = name.partition(".")
    owner = thing.parent if thing.is_function or thing.is_attribute else thing
    try:
        if owner is not None and owner.is_class and not rest and name in owner.all_members:
            path = owner.all_members[name].canonical_path
        else:
            path = ".".join(filter(None, (thing.resolve(first), rest)))
            found = thing.modules_collection[path]
            path = found.canonical_path
    except (KeyError, griffe.GriffeError):
        path = name
    return f'<autoref identifier="{path}" optional><code>{name.rpartition(".")[2]}</code></autoref>'
