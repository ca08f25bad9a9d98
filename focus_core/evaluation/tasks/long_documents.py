"""Load questions about single long documents: L-Eval, and BAMBOO's question files.

Rows keep their order. Choices are answered by their text, which counts without its letter too; where a row asks for F1
or ROUGE, that is the suite's score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.suite_metrics import Measure
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_LETTER = re.compile(r"^\(?([A-D])[).]\s*")
_LEVAL_MEASURES: dict[str, tuple[Measure | None, int | None]] = {
    "f1": (Measure("f1"), None),
    "rouge": (Measure("rouge-l"), 256),
}
_SECTION = re.compile(r"\n+(?=(?:Question|Document):\n)")


def leval(path: Path) -> Iterator[Trial]:
    """Yield one trial an instruction of an L-Eval file.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    for number, row in enumerate(read_rows(path)):
        if not isinstance(row.get("instructions"), list) or "input" not in row:
            raise EmptyCorpusError(f"rows of {path} have no instructions and input; give an L-Eval file")
        document = Document(f"document-{number}", str(row["input"]))
        measure, most = _LEVAL_MEASURES.get(str(row.get("evaluation")), (None, None))
        source = str(row.get("source") or path.name.split(".")[0])
        for ask, answer in zip(row["instructions"], row["outputs"], strict=True):
            answers = _with_and_without_letter(str(answer))
            yield Trial((document,), str(ask), answers, None, False, source, "any", most, measure)


def bamboo(path: Path) -> Iterator[Trial]:
    """Yield the rows of a BAMBOO question file: altqa, meetingqa, paperqa.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    for number, row in enumerate(read_rows(path)):
        if "content" not in row or "answer" not in row:
            raise EmptyCorpusError(f"rows of {path} have no content and answer; give a BAMBOO question file")
        ask, text, answers = _bamboo_row(row, path)
        yield Trial((Document(f"document-{number}", text),), ask, answers, None, False, path.name.split(".")[0])


def _bamboo_row(row: dict[str, Any], path: Path) -> tuple[str, str, tuple[str, ...]]:
    text, answer = str(row["content"]), str(row["answer"])
    if "options" in row:
        options = [str(option).strip() for option in row["options"]]
        chosen = next(option for option in options if option.startswith(answer))
        return "\n".join([str(row["question"]), *options]), text, _with_and_without_letter(chosen)
    told, *sections = _SECTION.split(text.strip())
    questions = [section for section in sections if section.startswith("Question:")]
    if len(questions) != 1:
        raise EmptyCorpusError(f"a row of {path} holds no question; give altqa, meetingqa or paperqa")
    document = "\n\n".join(section for section in sections if section not in questions)
    return f"{told}\n\n{questions[0]}".strip(), document, (answer,)


def _with_and_without_letter(answer: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((answer.strip(), _LETTER.sub("", answer.strip()))))
