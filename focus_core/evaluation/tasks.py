"""Make evaluation examples: documents, a question, and the answers that count as right.

Examples are functions of a seed. The passkey prompt is the one of Mohtashami and Jaggi (2024) that the paper's Fig. 1
uses; the questions are Natural Questions in the lost-in-the-middle setting. Nothing is run here.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from focus_core.corpus import Document
from focus_core.errors import DocumentNotFoundError
from focus_core.tokenization import TextTokenizer

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ASK = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Trial:
    """One question with known answers.

    Args:
        documents: what memory holds.
        question: the local context.
        answers: any of them, contained in the answer, is right.
        gold: id of the document that holds the answer, if one document alone does.
        raw: the question is text to continue, not a chat turn.
        label: what the trial varies, such as its depth.
    """

    documents: tuple[Document, ...]
    question: str
    answers: tuple[str, ...]
    gold: str | None
    raw: bool
    label: str


def passkey(tokenizer: TextTokenizer, tokens: int, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield passkey trials of about ``tokens`` memory tokens; the key's depth walks through ten places."""
    per_filler = len(tokenizer.encode(FILLER + "\n"))
    for index in range(trials):
        rng = random.Random(f"passkey/{seed}/{tokens}/{index}")
        key = rng.randint(1, 50000)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        lines = max(2, (tokens - 60) // per_filler)
        depth = (index % 10 + 0.5) / 10
        before = round(lines * depth)
        text = "\n".join([HEAD, *[FILLER] * before, needle, *[FILLER] * (lines - before)])
        yield Trial((Document("haystack", text),), ASK, (str(key),), None, True, f"depth {depth:.2f}")


def multi_document(path: Path, documents: int, trials: int, seed: int = 0, most_words: int = 120) -> Iterator[Trial]:
    """Yield questions whose gold document stands among others' documents, at a random place.

    Args:
        path: JSON lines with ``question``, ``answers`` and ``ctxs`` (gold first), gzipped or not.
        documents: how many documents memory holds; 1 is the gold document alone.
        trials: how many questions.
        seed: of the choice.
        most_words: longer documents are left out.

    Raises:
        DocumentNotFoundError: no file at ``path``.
    """
    if not path.is_file():
        raise DocumentNotFoundError(f"no question file at {str(path)!r}; check the path")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if len(row["ctxs"][0]["text"].split()) <= most_words]
    random.Random(f"multi/{seed}").shuffle(rows)
    for index, row in enumerate(rows[:trials]):
        rng = random.Random(f"multi/{seed}/{index}")
        answers = tuple(map(str, row["answers"]))
        others = [
            other
            for other in rng.sample(rows, len(rows))
            if other is not row and not any(answer.lower() in other["ctxs"][0]["text"].lower() for answer in answers)
        ][: documents - 1]
        gold = rng.randrange(documents)
        chosen = [*others[:gold], row, *others[gold:]]
        held = tuple(
            Document(f"doc-{place}", f"{item['ctxs'][0]['title']}\n{item['ctxs'][0]['text']}")
            for place, item in enumerate(chosen)
        )
        yield Trial(held, row["question"], answers, f"doc-{gold}", False, f"gold at {gold}")
