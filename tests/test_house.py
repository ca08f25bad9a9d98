"""Check the house: sizes and docstrings of modules, pages that name what exists and no machine."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 500
FOLDERS = ("focus_core", "focus_integrations", "tests", "examples", "scripts")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= MOST_LINES, f"{path.name} has {lines} lines; give a concept of it a file of its own"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path.name} has no module docstring"


def test_the_architecture_page_names_what_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    symbols = sorted(set(re.findall(r"`((?:focus_core|focus_integrations)(?:\.\w+)+)`", page)))
    assert len(symbols) >= 30
    assert [symbol for symbol in symbols if not _exists(symbol)] == []


def _exists(symbol: str) -> bool:
    parts = symbol.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for name in parts[split:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def test_nothing_names_the_machine_it_was_made_on() -> None:
    """Paths of a developer's machine in a page help nobody."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").rglob("*.md"), *PYTHON]
    foreign = [str(page) for page in pages if re.search(r"/(work|root|home)/\w", page.read_text(encoding="utf-8"))]
    assert foreign in ([], [str(Path(__file__))])
