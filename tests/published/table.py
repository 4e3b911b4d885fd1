"""The table of `docs/published.md`: every row of this suite. `python -m tests.published.table` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "published.md"
BEGIN, END = "<!-- rows: python -m tests.published.table -->", "<!-- end of rows -->"


def result(test: ast.FunctionDef) -> str:
    """A row's kind, from what the test calls and takes."""
    called = {
        node.func.id
        for node in ast.walk(test)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if "same" in called:
        return "equal"
    if "both_refuse" in called:
        return "both refuse"
    return "both" if "lib" in {argument.arg for argument in test.args.args} else "here"


def rows() -> str:
    """A table for each file of the suite, in the order of its tests."""
    parts = []
    for path in sorted(FOLDER.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [f"### {(ast.get_docstring(tree) or path.stem).splitlines()[0]}", ""]
        lines += ["| script | result | note |", "|---|---|---|"]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = node.name.removeprefix("test_").replace("_", " ").capitalize()
                note = " ".join((ast.get_docstring(node) or "").split()).replace("|", "\\|")
                lines.append(f"| {name} | {result(node)} | {note} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page's text with the rows of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{rows()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
