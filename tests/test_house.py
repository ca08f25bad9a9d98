"""Check the house: docstrings of modules, and pages that name no machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("focus_core", "focus_integrations", "tests", "examples", "scripts")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path.name} has no module docstring"


def test_nothing_names_the_machine_it_was_made_on() -> None:
    """Paths of a developer's machine in a page help nobody."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").rglob("*.md"), *PYTHON]
    foreign = [str(page) for page in pages if re.search(r"/(work|root|home)/\w", page.read_text(encoding="utf-8"))]
    assert foreign in ([], [str(Path(__file__))])
