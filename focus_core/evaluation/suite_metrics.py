"""Score an answer as its suite does: F1, ROUGE-L, class accuracy, paragraph number, count, edit similarity.

These are the measures of LongBench's table (Bai et al., 2023), by which its numbers in papers are comparable. ROUGE is
the ``rouge`` package that its own evaluation uses, edit similarity is rapidfuzz's ratio. Pure functions of strings.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from focus_core.errors import ConfigError
from focus_core.evaluation.metrics import f1

MeasureName = Literal["f1", "rouge-l", "class", "paragraph", "count", "edit"]

_COMMENTS = ("`", "#", "//")


@dataclass(frozen=True)
class Measure:
    """How a suite scores one of its data sets.

    Args:
        name: of the measure.
        classes: all names that could be said, for ``class``.
        first_line: only the first line of an answer counts, as in few-shot sets.
    """

    name: MeasureName
    classes: tuple[str, ...] = ()
    first_line: bool = False

    def __call__(self, text: str, answers: Sequence[str]) -> float:
        """Return the score of ``text``, 0 to 1: the best over ``answers``.

        Raises:
            ConfigError: the package that the measure needs is not installed.
        """
        if self.first_line:
            text = text.lstrip("\n").split("\n")[0]
        if self.name == "class":
            return max((_class(text, answer, self.classes) for answer in answers), default=0.0)
        return max((_MEASURES[self.name](text, answer) for answer in answers), default=0.0)


def rouge_l(text: str, answer: str) -> float:
    """Return ROUGE-L's F measure; 0 where one side has no words."""
    rouge = _package("rouge")
    limit = sys.getrecursionlimit()  # the package walks back through a whole sentence by recursion
    sys.setrecursionlimit(max(limit, len(text.split()) + len(answer.split()) + 1000))
    try:
        return float(rouge.Rouge(metrics=["rouge-l"]).get_scores([text], [answer], avg=True)["rouge-l"]["f"])
    except ValueError:  # nothing but punctuation
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


def edit_similarity(text: str, answer: str) -> float:
    """Return the similarity of the first line of code in ``text``, comments skipped, to ``answer``."""
    lines = [line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in _COMMENTS)]
    return float(_package("rapidfuzz.fuzz").ratio(lines[0] if lines else "", answer)) / 100


def paragraph_number(text: str, answer: str) -> float:
    """Return the share of the numbers in ``text`` that are the number of ``answer``, such as "Paragraph 12"."""
    wanted = re.search(r"\d+", answer)
    return _share(text, wanted.group() if wanted else answer)


def _share(text: str, wanted: str) -> float:
    said = re.findall(r"\d+", text)
    return said.count(wanted) / len(said) if said else 0.0


def _class(text: str, answer: str, classes: Sequence[str]) -> float:
    """Return 1 / n where ``text`` holds n class names and ``answer`` is one; parts of ``answer`` do not count."""
    said = {name for name in classes if name in text and (name == answer or name not in answer)}
    return 1 / len(said) if answer in said else 0.0


_MEASURES: dict[str, Callable[[str, str], float]] = {
    "f1": lambda text, answer: f1(text, [answer]),
    "rouge-l": rouge_l,
    "paragraph": paragraph_number,
    "count": _share,
    "edit": edit_similarity,
}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ConfigError(f"this score needs {package}; install it with `pip install {package}`") from error
