"""Tell test questions from development ones, by a committed list of hashes.

The test split was drawn once, from questions that no table had scored; it is used once a release (``focusllm eval
--release``), the development split everywhere else. Of lost-in-the-middle and the multi-hop sets it holds single
questions, of SQuAD whole articles. Files with none of these questions have no split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from focus_core.errors import ConfigError

Split = Literal["development", "test"]
LIST = Path(__file__).with_name("test_split.txt")
_Row = TypeVar("_Row")


def question_id(question: str) -> str:
    """Return the hash by which a question is listed: 16 hex digits of the SHA-256 of its text, trimmed."""
    return hashlib.sha256(question.strip().encode()).hexdigest()[:16]


@cache
def test_ids() -> frozenset[str]:
    """Return the ids of the test split."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def of_split(rows: Iterable[_Row], question: Callable[[_Row], str], split: Split) -> list[_Row]:
    """Return the rows of a split, in order.

    Args:
        rows: of a question file.
        question: the text of a row's question.
        split: which; a file without test questions is all development.

    Raises:
        ConfigError: the test split is asked for and the file has none of it.
    """
    found = [row for row in rows if (question_id(question(row)) in test_ids()) == (split == "test")]
    if not found and split == "test":
        raise ConfigError("this file holds no question of the test split; leave --release out for it")
    return found
