"""Writes what is generated: `python docs/generate.py`. With `--check` it only says whether it is current.

That is the table of methods in README.md, and docs/results.md (see results.py).

The table of methods is read from the sources, without importing them: a row for each module whose docstring has a
`Paper:` paragraph and that defines a class or function which its package exports.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import results

BEGIN, END = "<!-- methods: written by docs/generate.py -->", "<!-- end of methods -->"


class Method(NamedTuple):
    """A row of the table."""

    family: str
    path: str
    title: str
    summary: str
    public: tuple[str, ...]
    paper: str
    url: str


def exported(package: Path) -> set[str]:
    """The names that a package's `__init__.py` imports, which are what it offers."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def methods(root: Path = ROOT) -> Iterator[Method]:
    """Yields the methods of every family, by path."""
    packages = sorted({path.parent for folder in ("tfkit", "export") for path in (root / folder).rglob("__init__.py")})
    for package in packages:
        offered = exported(package)
        for path in sorted(package.glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstring = ast.get_docstring(tree) or ""
            defined = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
            public = tuple(name for name in defined if name in offered)
            cited = re.search(r"^Paper: (.*?)(?:\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
            if not (public and cited):
                continue
            paragraph = " ".join(cited[1].split())
            url = re.search(r"https://[^\s,;)]+", paragraph)
            if url is None:
                raise ValueError(f"{path}: the `Paper:` paragraph names no https address.")
            title, _, summary = docstring.splitlines()[0].partition(": ")
            relative = path.relative_to(root)
            family = "export" if relative.parts[0] == "export" else ".".join(relative.parts[1:-1])
            paper = paragraph[: url.start()].strip(" ,.;(")
            yield Method(family, str(relative), title.rstrip("."), summary, public, paper, url[0].rstrip(".:"))


def table(rows: list[Method]) -> str:
    """Returns the Markdown table."""
    lines = ["| family | method | in the code | paper |", "|---|---|---|---|"]
    for row in rows:
        what = f"**{row.title}**" + (f": {row.summary}" if row.summary else "")
        names = ", ".join(f"`{name}`" for name in row.public)
        cells = (row.family, what, f"[{names}]({row.path})", f"[{row.paper}]({row.url})")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def updated(text: str, content: str) -> str:
    """Returns `text` with what stands between the two marks replaced.

    Raises:
        ValueError: if a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the marks {BEGIN!r} and {END!r}.")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Writes, or with `--check` compares; returns the exit code."""
    readme = ROOT / "README.md"
    pages = {
        readme: updated(readme.read_text(encoding="utf-8"), table(list(methods()))),
        ROOT / "docs" / "results.md": results.page(ROOT / "benchmarks" / "results"),
    }
    stale = [path for path, new in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
    if stale and "--check" in arguments:
        print(f"{', '.join(path.name for path in stale)} not current. Run: make docs", file=sys.stderr)
        return 1
    for path in stale:
        temporary = path.with_suffix(".new")
        temporary.write_text(pages[path], encoding="utf-8")
        os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
