"""Make BABILong trials (Kuratov et al., 2024): the facts of a bAbI story hidden, in order, in other text.

Rows of the bAbI file are cut into stories with one question each. Trials are functions of a seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_text
from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.evaluation.trial import Trial

_LINE = re.compile(r"(\d+) (.*)")


@dataclass(frozen=True)
class Story:
    """Facts in order, a question about them, and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


def babilong(haystack: Haystack, path: Path, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield stories hidden in filler.

    Args:
        haystack: filler.
        path: a bAbI file, such as qa1.
        trials: how many.
        seed: of the choice and the places.

    Raises:
        EmptyCorpusError: the file holds no stories.
    """
    stories = read_stories(path)
    rng = random.Random(f"babilong/{seed}")
    for index, story in enumerate(rng.sample(stories, min(trials, len(stories)))):
        places = random.Random(f"babilong/{seed}/{haystack.tokens}/{index}")
        depths = sorted(places.random() for _ in story.facts)
        documents = haystack.hide(story.facts, depths)
        label = f"{len(story.facts)} facts"
        yield Trial(documents, story.question, (story.answer,), None, False, label)


def read_stories(path: Path) -> list[Story]:
    """Read a bAbI file: one story a question, with every fact that stands before it."""
    stories: list[Story] = []
    facts: list[str] = []
    for line in read_text(path).split("\n"):
        found = _LINE.fullmatch(line.strip("\r\n"))
        if found is None:
            continue
        if found.group(1) == "1":
            facts = []
        parts = found.group(2).split("\t")
        if len(parts) == 1:
            facts.append(" ".join(parts[0].split()))
        else:
            stories.append(Story(tuple(facts), parts[0].strip(), parts[1].strip()))
    if not stories:
        raise EmptyCorpusError(f"{path} holds no bAbI stories; give a file of numbered facts and tabbed questions")
    return stories
