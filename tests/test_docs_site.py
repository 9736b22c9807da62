"""The documentation: it builds as a site without a warning, its links lead somewhere, it asks no other host for
anything, and the code of the pages that have no test of their own runs.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sophia

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("index.md", "optimizer.md")
LOADING = {"src", "srcset", "poster", "data"}


class Page(HTMLParser):
    """What a page of the site has and wants."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.words = set(), [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.words |= set((found.get("class") or "").split()) | {tag}
        self.loads += [value for name, value in attrs if name in LOADING and value and tag != "meta"]
        if "style" in found:
            self.loads += re.findall(r"url\((.*?)\)", found["style"])
        if tag == "link" and found["rel"] not in ("canonical", "next", "prev"):
            self.loads.append(found["href"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs the extra docs")
    pytest.importorskip("material", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # what the theme says of its own future
    made = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "WARNING" not in made.stderr, made.stderr
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}, folder


def target(page, link, folder):
    """The file of the site that a link leads to, and its anchor."""
    parts = urlsplit(link)
    base = folder if parts.path.startswith("/") else (folder / page).parent
    path = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else folder / page
    return (path / "index.html" if path.is_dir() else path), unquote(parts.fragment)


def test_links_lead_to_a_page_and_an_anchor(site):
    pages, folder = site
    assert {"index.html", "optimizer.html", "integrations/lightning.html", "reference/optimizers.html"} <= set(pages)
    lost, checked = [], 0
    for name, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//"):
                assert link.startswith("https://"), (name, link)
                continue
            path, anchor = target(name, link, folder)
            inside = path.relative_to(folder.resolve()).as_posix() if path.is_relative_to(folder.resolve()) else None
            known = pages[inside].anchors | {"", "__top"} if inside in pages else {""}
            checked += 1
            if inside is None or not path.exists() or anchor not in known:
                lost.append((name, link))
    assert not lost
    assert checked > 1000


def test_no_page_loads_anything_from_another_host(site):
    pages, folder = site
    loads = 0
    for name, page in pages.items():
        for load in page.loads:
            if load.startswith("data:"):
                continue
            parts = urlsplit(load)
            assert not parts.scheme, (name, load)
            assert not parts.netloc, (name, load)
            assert target(name, load, folder)[0].exists(), (name, load)
            loads += 1
        # The theme's script fetches more for these.
        assert not page.words & {"mermaid", "md-source", "giscus", "iframe", "object", "embed"}, name
    assert loads > 2 * len(pages)
    for sheet in folder.rglob("*.css"):
        for load in re.findall(r"(?:@import\s+|url\()\s*[\"']?([^\"')\s;]+)", sheet.read_text(encoding="utf-8")):
            assert load.startswith("data:") or not urlsplit(load).netloc, (sheet, load)


def test_the_reference_has_all_public_names(site):
    anchors = set().union(*(page.anchors for page in site[0].values()))
    for module in (sophia, sophia.curvature, sophia.convert):
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, type(sophia)) or name.startswith("__"):
                continue
            assert f"{module.__name__}.{name}" in anchors, name
    for name in ("refresh_curvature", "attach", "stats", "update_curvature", "step"):
        assert f"sophia.Sophia.{name}" in anchors, name


def test_docstrings_become_text(site):
    """No role or fence of a docstring is left as it stands in the source; formulas keep their lines."""
    for path in (site[1] / "reference").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r":(class|meth|func|attr|data):", text), path
    text = (site[1] / "reference" / "optimizers.html").read_text(encoding="utf-8")
    assert re.search(r"<pre>.*?m ← β1 m \+ \(1 − β1\) g\nh ← β2 h", text)
    assert re.search(r'href="#sophia\.SophiaG"[^>]*><code>SophiaG</code>', text)
    assert re.search(r"<li[^>]*>\s*(<p>)?<code>clip_fraction</code> – coordinates", text)
    assert "on some rank. Such\na refresh is counted" in text  # one item of a list, not two


def blocks(language, page):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks("python", page)])
def test_code(page, code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    tokens = torch.randint(0, 20, (12, 4, 6))
    # The example of a padded vocabulary has more entries than the model, which makes no step there.
    scope = {"model": model, "loader": [(t, (t + 1) % 20) for t in tokens], "F": F}
    before = [p.clone() for p in model.parameters()]
    exec(compile(code, page, "exec"), scope)
    assert isinstance(scope["optimizer"], sophia.SophiaG)
    moved = any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert moved == (".step()" in code)


def test_commands():
    """The README's test runs them."""
    readme = "\n".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in "\n".join(blocks("sh", "index.md")).splitlines():
        extras = re.fullmatch(r"pip install '\.\[([\w,]+)\]'", line)
        if extras:
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(",")), line
        else:
            assert line in readme.splitlines(), line


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_links_lead_somewhere_in_the_repository_too(page):
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text):
        assert ((DOCS / page).parent / link).exists(), link


def test_the_picture_is_that_of_the_numbers(tmp_path):
    """And its command draws it."""
    numbers = (DOCS / "assets" / "gamma.json").read_text(encoding="utf-8")
    mark = f"gamma.json {hashlib.sha256(numbers.encode()).hexdigest()}"
    assert mark in (DOCS / "assets" / "gamma.svg").read_text(encoding="utf-8")
    page = (DOCS / "optimizer.md").read_text(encoding="utf-8")
    ends = {run["gamma"]: (run["clip_fraction"][-1], run["val_loss"][-1]) for run in json.loads(numbers)["runs"]}
    best = min(ends, key=lambda gamma: ends[gamma][1])
    assert (
        f"γ = {best:g} clips {ends[best][0]:.0%} at the end and reaches {ends[best][1]:.2f}".replace("%", " %") in page
    )
    for gamma in (0.02, 0.1, 0.3, 3.0):
        assert f"{ends[gamma][0]:.0%}".replace("%", " %") in page, gamma
        assert f"{ends[gamma][1]:.2f}" in page, gamma
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("gamma", DOCS / "assets" / "gamma.py")
    gamma = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gamma)
    gamma.draw(numbers, tmp_path / "gamma.svg")
    assert mark in (tmp_path / "gamma.svg").read_text(encoding="utf-8")
