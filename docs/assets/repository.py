"""A hook of mkdocs: pages link to files of the repository, and the site has them too.

A link that leaves docs/ leads, in the repository, to a file there. In the site that file becomes a page (Markdown,
code, the list of a folder) or lies beside the pages as it is (all else), and the link is turned to it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
ALWAYS = ("README.md", "CHANGELOG.md", "benchmarks/studies/README.md")
NAMED = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md"}
CODE = {".py": "python", ".toml": "toml"}
# Inline links and pictures; a fence of code is matched first, so that what stands in it is left alone.
LINK = re.compile(r"^```.*?^```$|(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"<code>[^<]*</code>")
SHIM = "https://unpkg.com/iframe-worker/shim"
FLAG = re.compile(r"(?<![\w-])--[\w-]+")


def place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path in NAMED:
        return NAMED[path]
    own = path.startswith("docs/")
    there = path.removeprefix("docs/") if own else f"files/{path}"
    if (ROOT / path).is_dir():
        return f"{there}/index.md"
    return f"{there}.md" if Path(path).suffix in CODE and not own else there


def turned(markdown: str, path: str, found: set[str]) -> str:
    """The text of the repository's file `path` with its links turned; what they lead to outside docs/ joins `found`."""
    here = posixpath.dirname(place(path))

    def turn(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        if target.startswith("..") or not (ROOT / target).exists():
            return match[0]  # mkdocs says so
        if not target.startswith("docs/") or (ROOT / target).is_dir():
            found.add(target)
        return posixpath.relpath(place(target), here) + (match[2] or "")

    return LINK.sub(turn, markdown)


def content(path: str, found: set[str]) -> str | None:
    """The page of a file outside docs/, or None for one that is no page."""
    file = ROOT / path
    if file.is_dir():
        entries = sorted(f"{path}/{entry.name}" for entry in file.iterdir() if entry.is_file() and entry.name[0] != ".")
        found.update(entry for entry in entries if not entry.startswith("docs/"))
        here = posixpath.dirname(place(path))
        links = (f"- [{posixpath.basename(entry)}]({posixpath.relpath(place(entry), here)})" for entry in entries)
        return f"# {path}\n\n" + "\n".join(links) + "\n"
    if file.suffix in CODE:
        return f"# {path}\n\n```{CODE[file.suffix]}\n{file.read_text(encoding='utf-8')}```\n"
    return turned(file.read_text(encoding="utf-8"), path, found) if file.suffix == ".md" else None


def on_files(files: Files, *, config: Any) -> Files:
    """Add all files that pages lead to, and those that they lead to in turn."""
    waiting = set(ALWAYS)
    for page in files.documentation_pages():
        turned(page.content_string, f"docs/{page.src_uri}", waiting)
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        found: set[str] = set()
        page = content(path, found)
        source = {"abs_src_path": str(ROOT / path)} if page is None else {"content": page}
        files.append(File.generated(config, place(path), inclusion=InclusionLevel.NOT_IN_NAV, **source))
        waiting |= found - done
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn the links of a page that lies in docs/."""
    return markdown if page.file.generated_by else turned(markdown, f"docs/{page.file.src_uri}", set())


def on_page_content(html: str, **_: Any) -> str:
    """Keep `--flags` in one piece where a line ends."""
    return INLINE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), html)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """The theme would fetch from another host what lets a page search that was opened from a disk."""
    return output.replace(SHIM, posixpath.relpath("assets/worker.js", posixpath.dirname(page.file.dest_uri)))


def on_post_template(output_content: str, *, template_name: str, **_: Any) -> str:
    """The same for pages that no Markdown file stands for."""
    return output_content.replace(SHIM, "/assets/worker.js")
