"""Make few-shot trials: name the class of a text, after labelled texts that stand in memory.

Long in-context learning as LongBench's TREC asks for it, with any labelled data: rows hold ``text`` and ``category``.
Trials are functions of a seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from focus_core.errors import ConfigError, EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.suite_metrics import Measure
from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

Labelled = tuple[str, str]


def few_shot(haystack: Haystack, folder: Path, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield texts to label; the same demonstrations, as many as fit, stand in memory in every trial.

    Args:
        haystack: its tokens are filled with demonstrations, one of every class before a second of any.
        folder: holds ``train*`` files, the demonstrations, and ``test*`` files, the questions.
        trials: how many.
        seed: of the order and the choice.

    Raises:
        ConfigError: ``folder`` is not a folder.
        EmptyCorpusError: it holds no such files, or rows of another kind.
    """
    shown, asked = (_labelled(folder, kind) for kind in ("train", "test"))
    rng = random.Random(f"few-shot/{seed}")
    document = Document("demonstrations", _demonstrations(haystack, _rounds(rng, shown)))
    measure = Measure("class", tuple(sorted({name for _, name in shown})), first_line=True)
    for text, name in rng.sample(asked, min(trials, len(asked))):
        yield Trial((document,), _row(text, ""), (name,), None, True, "", measure=measure)


def _labelled(folder: Path, kind: str) -> list[Labelled]:
    if not folder.is_dir():
        raise ConfigError(f"few-shot needs a folder with train* and test* files, but {folder} is not one")
    rows = [row for file in sorted(folder.glob(f"{kind}*")) for row in read_rows(file)]
    if not rows or not all("text" in row and "category" in row for row in rows):
        raise EmptyCorpusError(f"{folder} holds no {kind}* file whose rows have text and category")
    return [(str(row["text"]).strip(), str(row["category"])) for row in rows]


def _rounds(rng: random.Random, shown: list[Labelled]) -> list[Labelled]:
    """Return demonstrations so that every class has its n-th before any has its next."""
    by_name: dict[str, list[Labelled]] = defaultdict(list)
    for row in rng.sample(shown, len(shown)):
        by_name[row[1]].append(row)
    return [row for several in zip_longest(*by_name.values()) for row in several if row is not None]


def _demonstrations(haystack: Haystack, rows: list[Labelled]) -> str:
    kept: list[str] = []
    left = haystack.tokens
    for text, name in rows:
        line = _row(text, f" {name}\n\n")
        left -= len(haystack.tokenizer.encode(line))
        if left < 0 and kept:
            break
        kept.append(line)
    return "".join(kept)


def _row(text: str, name: str) -> str:
    return f"Text: {text}\nCategory:{name}"
