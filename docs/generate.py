"""Writes what is generated: `python docs/generate.py`. With `--check` it only says whether it is current.

That is the list of methods in README.md, docs/methods.md, which says more of each, and docs/results.md (see
results.py).

The methods are read from the sources, without importing them: one for each module whose docstring has a `Paper:`
paragraph and that defines a class or function which its package exports.
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


def families(rows: list[Method]) -> dict[str, list[Method]]:
    """Returns the methods of each family, in the order they came."""
    return {
        family: [row for row in rows if row.family == family] for family in dict.fromkeys(row.family for row in rows)
    }


def overview(rows: list[Method]) -> str:
    """Returns a Markdown table with a row for each family: the titles of its methods, each a link to its code."""
    lines = ["| family | methods |", "|---|---|"]
    for family, some in families(rows).items():
        lines.append(
            f"| {family} | " + ", ".join(f"[{row.title}]({row.path})" for row in some).replace("|", "\\|") + " |"
        )
    return "\n".join(lines)


def page(rows: list[Method]) -> str:
    """Returns the page of all methods: for each family a table of what they do, their names in the code and papers."""
    parts = [
        "# Methods",
        "Written by `make docs` from the sources, where each module says how it differs from its paper.",
    ]
    for family, some in families(rows).items():
        lines = ["| method | in the code | paper |", "|---|---|---|"]
        for row in some:
            what = f"**{row.title}**" + (f": {row.summary}" if row.summary else "")
            names = ", ".join(f"`{name}`" for name in row.public)
            cells = (what, f"[{names}](../{row.path})", f"[{row.paper}]({row.url})")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts += [f"## {family}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


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
    readme, rows = ROOT / "README.md", list(methods())
    pages = {
        readme: updated(readme.read_text(encoding="utf-8"), overview(rows)),
        ROOT / "docs" / "methods.md": page(rows),
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
