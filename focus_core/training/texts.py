"""Read training files into long texts and question rows.

Files may be plain text or JSON lines, gzipped or not. Rows with ``text`` are long texts, or passages where they are
short; rows with a ``question``, its ``answers`` and a ``context`` (or ``ctxs``) are question rows; rows with a
``prompt`` and its ``completion`` become question rows where the prompt shows a passage with the completion, and
passages where it lists paragraphs. The module draws nothing and runs no model; what a file cannot give is left out
silently, an empty result is an error.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from focus_core.errors import CorpusError, DocumentNotFoundError, EmptyCorpusError

_SUFFIXES = (".txt", ".jsonl", ".parquet", ".md", ".py", ".rst", ".tex")
LONG_TEXT = 2000  # characters that a text needs to be cut into memory and local context
_PASSAGE = (120, LONG_TEXT)  # characters of a passage
_T = TypeVar("_T")
_LONGEST_ANSWER = 200  # characters; longer completions are retold, not found


@dataclass(frozen=True)
class QuestionRow:
    """A question, its answers and the passage that holds them.

    Without answers it is a question that its passage looks like an answer to and is none. ``sentence`` is the answer as
    a whole sentence, empty where nobody wrote one.
    """

    question: str
    answers: tuple[str, ...]
    title: str
    context: str
    sentence: str = ""

    @property
    def fullest(self) -> str:
        """The longest answer: a full name rather than a part of it."""
        return max(self.answers, key=len, default="")


@dataclass(frozen=True)
class Passage:
    """A short text that questions can be made about; its title may be empty."""

    title: str
    text: str


@dataclass(frozen=True)
class TrainingTexts:
    """What the files hold: long texts, question rows and passages nobody asks about.

    Args:
        texts: all of them, in the order of the files.
        questions: rows that hold their answer.
        passages: short texts.
        files: for each text the number of its file; empty says that each has its own.
        unanswered: rows whose passage does not answer them.
    """

    texts: tuple[str, ...]
    questions: tuple[QuestionRow, ...]
    passages: tuple[Passage, ...] = ()
    files: tuple[int, ...] = ()
    unanswered: tuple[QuestionRow, ...] = ()

    def joined(self) -> list[str]:
        """Return one text a file: its long texts in their order, a blank line between them."""
        groups: dict[int, list[str]] = defaultdict(list)
        for number, text in zip(self.files or range(len(self.texts)), self.texts, strict=True):
            if len(text) >= LONG_TEXT:
                groups[number].append(text)
        return ["\n\n".join(group) for group in groups.values()]


def data_fingerprint(paths: Iterable[Path]) -> str:
    """Return a hash of the bytes that :func:`read_training_texts` would read, in its order; names do not count."""
    return hash_files(file for path in paths for file in _files(path))


def hash_files(files: Iterable[Path]) -> str:
    """Return a hash of what files hold, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_training_texts(paths: Iterable[Path]) -> TrainingTexts:
    """Read files and folders (recursively).

    Raises:
        DocumentNotFoundError: a path does not exist.
        EmptyCorpusError: nothing usable was found.
    """
    paths = list(paths)
    texts: list[str] = []
    files: list[int] = []
    questions: dict[QuestionRow, None] = {}  # sets that keep their order
    passages: dict[Passage, None] = {}
    unanswered: dict[QuestionRow, None] = {}
    number = 0
    for path in paths:
        for file in _files(path):
            if file.name.removesuffix(".gz").endswith((".jsonl", ".parquet")):
                for row in _rows(file):
                    question = _question_row(row) or _instruction_row(row)
                    if question is not None:
                        (questions if question.answers else unanswered)[question] = None
                    elif isinstance(row.get("text"), str) and "question" not in row:
                        texts.append(row["text"])
                        passages.update(dict.fromkeys(_own_passage(row)))
                    else:
                        passages.update(dict.fromkeys(_shown_passages(row)))
            else:
                texts.append(_read(file))
            number += 1
            files += [number] * (len(texts) - len(files))
    if not texts and not questions:
        raise EmptyCorpusError(
            f"no training text in {', '.join(map(str, paths))}; give .txt or .jsonl files (also .gz) with `text` rows"
        )
    rows = _with_sentences(questions)
    return TrainingTexts(tuple(texts), rows, tuple(passages), tuple(files), tuple(unanswered))


def _with_sentences(rows: Iterable[QuestionRow]) -> tuple[QuestionRow, ...]:
    """Return each question once; the row that has a sentence stands for the others of the same passage."""
    kept: dict[tuple[str, str, str], QuestionRow] = {}
    for row in rows:
        key = (row.question, row.title, row.context)
        if key not in kept or (row.sentence and not kept[key].sentence):
            kept[key] = row
    return tuple(kept.values())


def hold_out(texts: TrainingTexts, share: float, seed: int) -> tuple[TrainingTexts, TrainingTexts]:
    """Split into what is trained on and a share that is not: whole texts, and whole passages with all their questions.

    At least one of each is held out where there are two or more; of a single text its end is. Short texts, which no
    objective uses, are left out.
    """
    rng = random.Random(f"{seed}/held out")
    long = [text for text in dict.fromkeys(texts.texts) if len(text) >= LONG_TEXT]
    if len(long) == 1 and len(long[0]) >= 4 * LONG_TEXT:
        end = max(LONG_TEXT, round(share * len(long[0])))
        kept_texts, held_texts = [long[0][:-end]], [long[0][-end:]]
    else:
        kept_texts, held_texts = _split(rng, long, share)
    passages = dict.fromkeys(row.context for row in texts.questions)
    held = set(_split(rng, list(passages), share)[1])

    def parts(rows: tuple[QuestionRow, ...]) -> tuple[tuple[QuestionRow, ...], tuple[QuestionRow, ...]]:
        kept, out = (tuple(row for row in rows if (row.context in held) == apart) for apart in (False, True))
        return kept, out

    kept_rows, held_rows = parts(texts.questions)
    kept_none, held_none = parts(texts.unanswered)
    unasked = _split(rng, list(texts.passages), share)
    file = dict(zip(texts.texts, texts.files or range(len(texts.texts)), strict=True))
    kept_files, held_files = (tuple(file.get(text, 0) for text in part) for part in (kept_texts, held_texts))
    return (
        TrainingTexts(tuple(kept_texts), kept_rows, tuple(unasked[0]), kept_files, kept_none),
        TrainingTexts(tuple(held_texts), held_rows, tuple(unasked[1]), held_files, held_none),
    )


def _split(rng: random.Random, items: list[_T], share: float) -> tuple[list[_T], list[_T]]:
    count = 0 if len(items) < 2 else max(1, round(share * len(items)))
    held = set(rng.sample(range(len(items)), count))
    return [item for n, item in enumerate(items) if n not in held], [items[n] for n in sorted(held)]


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise DocumentNotFoundError(f"training data {path} does not exist; check the --data paths")
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and Path(file.name.removesuffix(".gz")).suffix in _SUFFIXES:
            yield file


def _read(path: Path) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        return str(file.read())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path}, line {number}, is no JSON ({error}); give one row a line") from error
            if isinstance(row, dict):
                yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise CorpusError(f"{path} needs pyarrow; run `pip install pyarrow`, or give JSON lines") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ArrowInvalid) as error:
        raise CorpusError(f"{path} is no Parquet file ({error}); get it again, or leave it out") from error


def _question_row(row: dict[str, Any]) -> QuestionRow | None:
    """Return a row with question, answers and a passage that holds one of them, or marked as unanswerable."""
    if not isinstance(row.get("question"), str):
        return None
    answers = row.get("answers") or row.get("answer") or []
    answers = answers.get("text", []) if isinstance(answers, dict) else answers  # SQuAD's own layout
    answers = [answers] if isinstance(answers, str) else answers
    contexts = row.get("ctxs") or [{"title": row.get("title", ""), "text": row.get("context", "")}]
    passage, title = str(contexts[0].get("text", "")), str(contexts[0].get("title", ""))
    if not answers and row.get("is_impossible"):
        return QuestionRow(row["question"], (), title.replace("_", " "), passage)
    held = tuple(str(answer) for answer in answers if str(answer) and str(answer).lower() in passage.lower())
    sentence = str(row.get("sentence") or "")
    return QuestionRow(row["question"], held, title.replace("_", " "), passage, sentence) if held else None


def _own_passage(row: dict[str, Any]) -> list[Passage]:
    text = row["text"].strip()
    return [Passage(str(row.get("title") or ""), text)] if _PASSAGE[0] <= len(text) < _PASSAGE[1] else []


def _shown_passages(row: dict[str, Any]) -> Iterator[Passage]:
    """Yield the listed paragraphs of an instruction row's prompt."""
    if isinstance(row.get("prompt"), str):
        for part in re.split(r"\n\s*\n", row["prompt"]):
            if part.startswith("- ") and _PASSAGE[0] <= len(part) < _PASSAGE[1]:
                yield Passage("", part[2:].strip())


# -- instruction rows -------------------------------------------------------------------------------------------

_PASSAGES = ("context", "movie plot", "plot", "text", "paragraph", "passage", "article")
_TITLES = ("title", "movie title", "plot title", "movie plot title")
_LABEL = re.compile(
    rf"^[ \t]*({'|'.join(sorted((*_PASSAGES, *_TITLES, 'question', 'my question', 'answer'), key=len, reverse=True))})"
    r"[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTED = (
    re.compile(
        r'passage\s+"(?P<passage>.+)",\s+answer the following question\b[^\n]*\s+question:(?P<question>.+)', re.S | re.I
    ),
    re.compile(r'answer to the question "(?P<question>[^\n]+?)" is in "(?P<passage>.+)"\.[^\n]*', re.S | re.I),
)
"""Where instruction prompts (the T0 collection's and alike) hold question and passage: behind labels, or in quotes."""


def _instruction_row(row: dict[str, Any]) -> QuestionRow | None:
    """Return the question of a prompt whose passage contains the completion, else ``None``."""
    prompt, answer = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return None
    question, passage, title = _parts(prompt.strip())
    answer = answer.strip()
    words = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)  # not the C of "C. Nobody knows"
    if (
        len(question) < 6
        or not 1 < len(answer) <= _LONGEST_ANSWER
        or not words.search(passage)
        or words.search(question)
    ):
        return None
    return QuestionRow(question, (answer,), title, passage)


def _parts(prompt: str) -> tuple[str, str, str]:
    """Return question, passage and title of a prompt; empty where it has none."""
    for layout in _QUOTED:
        quoted = layout.search(prompt)
        if quoted:
            return quoted["question"].strip(), quoted["passage"].strip(), ""
    labels = list(_LABEL.finditer(prompt))
    ends = [label.start() for label in labels[1:]] + [len(prompt)]
    parts: dict[str, str] = {}
    for label, end in zip(labels, ends, strict=False):
        parts.setdefault(label[1].lower(), prompt[label.end() : end].strip().strip('"').strip())
    question = parts.get("my question", parts.get("question", ""))
    passage = next((parts[name] for name in _PASSAGES if name in parts), "")
    title = next((parts[name] for name in _TITLES if name in parts), "")
    return question.split("\n")[0].strip().strip('"'), passage, title.split("\n")[0]
