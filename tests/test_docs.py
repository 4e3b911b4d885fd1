"""Names of the package that the documentation gives exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.published import table

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDERS = (
    "backends|controls|evaluate|models|pipelines|quantize|sampling|scheduler|serve|train|trigflow|weights"
)
DOTTED = re.compile(rf"`((?:{FOLDERS})(?:\.[A-Za-z_]+)+)`")


def exists(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(["sana_sprint", *parts[:end]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


# The log tells what was, by the names of its time.
@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md") if path.name != "log.md"))
def test_dotted_names_in_the_documentation_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    names = {name for name in DOTTED.findall(text) if not name.endswith((".py", ".toml", ".json", ".html"))}
    assert not sorted(name for name in names if not exists(name))


def test_the_page_on_published_scripts_has_the_rows_of_today() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text) == text, "run: python -m tests.published.table"
