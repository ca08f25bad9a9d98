"""Draw training examples from text files, reproducibly: example i of step n depends on the seed alone.

Files may be plain text or JSON lines, gzipped or not. Rows with ``text`` feed the text objectives; rows with a
``question``, its ``answers`` and a ``context`` (or ``ctxs``) feed the question objective. Facts for the needle
objective are invented here. The module runs no model; it hands out :class:`~focus_core.training.objectives.Example`.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from focus_core.config import TrainConfig
from focus_core.errors import DocumentNotFoundError, EmptyCorpusError
from focus_core.training.objectives import Example, Query


class Tokenizer(Protocol):
    """The little that example drawing needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def chat(self, question: str, system: str | None = None) -> list[int]: ...

    @property
    def end_token(self) -> int: ...


@dataclass(frozen=True)
class QuestionRow:
    """A question, its answer and the passage that holds it."""

    question: str
    answers: tuple[str, ...]
    title: str
    context: str


@dataclass(frozen=True)
class TrainingTexts:
    """What the files hold: long texts and question rows."""

    texts: tuple[str, ...]
    questions: tuple[QuestionRow, ...]


def read_training_texts(paths: Iterable[Path]) -> TrainingTexts:
    """Read files and folders (recursively).

    Raises:
        DocumentNotFoundError: a path does not exist.
        EmptyCorpusError: nothing usable was found.
    """
    texts: list[str] = []
    questions: list[QuestionRow] = []
    for path in paths:
        if not path.exists():
            raise DocumentNotFoundError(f"training data {path} does not exist; check the --data paths")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.name.removesuffix(".gz")
            if not file.is_file() or Path(name).suffix not in (".txt", ".jsonl", ".md", ".py", ".rst", ".tex"):
                continue
            if name.endswith(".jsonl"):
                for row in _rows(file):
                    _sort_row(row, texts, questions)
            else:
                texts.append(_read(file))
    if not texts and not questions:
        raise EmptyCorpusError(
            f"no training text in {', '.join(map(str, paths))}; give .txt or .jsonl files (also .gz) with `text` rows"
        )
    return TrainingTexts(tuple(texts), tuple(questions))


class ExampleStream:
    """Draws examples of the mixed objectives.

    Args:
        texts: from :func:`read_training_texts`.
        tokenizer: of the base.
        config: mix, sizes and seed.
    """

    def __init__(self, texts: TrainingTexts, tokenizer: Tokenizer, config: TrainConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.questions = texts.questions
        self.long = [text for text in texts.texts if len(text) >= 2000]
        self._sizes = [len(text) ** 0.5 for text in self.long]
        self.mix = dict(config.mix)
        if not self.long:
            self.mix["reconstruction"] = self.mix["continuation"] = self.mix["needle"] = 0.0
        if not self.questions:
            self.mix["question"] = 0.0
        if sum(self.mix.values()) <= 0:
            raise EmptyCorpusError(
                f"the mix {config.mix} needs texts of at least 2,000 characters (found {len(self.long)}) or question "
                f"rows (found {len(self.questions)}); give other --data or another mix"
            )

    def example(self, step: int, index: int) -> Example:
        """Draw example ``index`` of ``step``: the same for the same seed, whatever was drawn before."""
        rng = random.Random(f"{self.config.seed}/{step}/{index}")
        kind = rng.choices(list(self.mix), weights=list(self.mix.values()))[0]
        if kind == "question":
            return self._question(rng)
        if kind == "needle":
            return self._needle(rng)
        return self._text(rng, kind)

    # -- text objectives ----------------------------------------------------------------------------------------

    def _text(self, rng: random.Random, kind: str) -> Example:
        """Continuation: the local context follows the memory. Reconstruction: it is a span of the memory."""
        config = self.config
        size = rng.choice(config.chunk_sizes)
        count = _log_uniform(rng, 1, max(1, min(config.max_chunks, config.max_memory_tokens // size)))
        low, high = config.local_tokens
        split = rng.randint(4, max(4, low - 8))
        length = split + max(2, min(rng.randint(low, high) - split, config.max_candidate_rows // count))
        needed = size * count + (length if kind == "continuation" else 0)
        ids = self._window(rng, max(needed, length + 1))
        memory = ids[: size * count]
        chunks = tuple(tuple(memory[start : start + size]) for start in range(0, len(memory), size))
        if kind == "continuation":
            queries = [Query(tuple(ids[len(memory) : len(memory) + length]), split)]
        else:
            starts = [rng.randrange(max(1, len(memory) - length)) for _ in range(1 if count > 8 else 2)]
            queries = [Query(tuple(memory[start : start + length]), split) for start in starts]
        return Example(chunks, tuple(queries), kind)

    def _window(self, rng: random.Random, tokens: int) -> list[int]:
        """Return ``tokens`` consecutive token ids from a random place of a random text."""
        for attempt in range(20):
            text = rng.choices(self.long, weights=self._sizes)[0]
            characters = int(tokens * 5) + 64
            start = rng.randrange(max(1, len(text) - characters))
            ids = self.tokenizer.encode(text[start : start + characters])
            if len(ids) >= tokens or attempt == 19:
                return ids[:tokens]
        raise AssertionError("unreachable")

    # -- questions ----------------------------------------------------------------------------------------------

    def _question(self, rng: random.Random) -> Example:
        """Questions over documents, one document a chunk; each question's own document is among them."""
        config = self.config
        size = rng.choice([48, 64, 96, 128])
        most = max(2, min(config.max_chunks, config.max_memory_tokens // size))
        count = _log_uniform(rng, 2, most)
        asked = rng.sample(self.questions, min(config.questions_per_example, count, len(self.questions)))
        golds = [self._passage(rng, row, size, keep=True) for row in asked]
        forbidden = [answer.lower() for row in asked for answer in row.answers]
        others: list[list[int]] = []
        near = [row for row in self.questions if row.title in {item.title for item in asked}]
        for _ in range(10 * count):
            if len(golds) + len(others) >= count:
                break
            row = rng.choice(near if near and rng.random() < 0.3 else self.questions)
            if not any(answer in row.context.lower() for answer in forbidden):
                others.append(self._passage(rng, row, size, keep=False))
        chunks = golds + others
        rng.shuffle(chunks)
        short = rng.random() < 0.8
        budget = max(2, config.max_candidate_rows // len(chunks))
        queries = [
            self._chat_query(f"{row.question}\n{SHORT_ANSWER}" if short else row.question, row.answers[0], budget)
            for row in asked
        ]
        return Example(tuple(map(tuple, chunks)), tuple(queries), "question")

    def _chat_query(self, question: str, answer: str, most_targets: int) -> Query:
        given = self.tokenizer.chat(question, SYSTEM)
        targets = [*self.tokenizer.encode(answer), self.tokenizer.end_token][:most_targets]
        return Query((*given, *targets), len(given))

    def _passage(self, rng: random.Random, row: QuestionRow, size: int, *, keep: bool) -> list[int]:
        """Cut a passage to ``size`` tokens, around the answer if ``keep``."""
        text = row.context
        title = f"{row.title}\n" if row.title and rng.random() < 0.7 else ""
        head = self.tokenizer.encode(title) if title else []
        room = max(8, size - len(head))
        ids = self.tokenizer.encode(text)
        if len(ids) <= room:
            return head + ids
        last = len(ids) - room
        start = rng.randint(0, last)
        if keep:
            at = text.lower().find(row.answers[0].lower())
            middle = len(self.tokenizer.encode(text[: max(at, 0)]))
            length = len(self.tokenizer.encode(row.answers[0]))
            start = min(
                last, max(0, rng.randint(middle + length + 4 - room, max(middle - 4, middle + length + 4 - room)))
            )
        return head + ids[start : start + room]

    # -- needles ------------------------------------------------------------------------------------------------

    def _needle(self, rng: random.Random) -> Example:
        """Invented facts hidden in filler, with facts beside them that look alike."""
        config = self.config
        size = rng.choice([size for size in config.chunk_sizes if size >= 32] or [32])
        count = _log_uniform(rng, 2, max(2, min(config.max_chunks, config.max_memory_tokens // size)))
        facts = invent_facts(rng, rng.choice([1, 1, 2, 4, 8]))
        filler = self._filler(rng, size * count)
        chunks = [filler[start : start + size] for start in range(0, size * count, size)]
        for fact in facts:
            ids = self.tokenizer.encode(fact.statement)
            chunk = rng.choice(chunks)
            start = rng.randrange(max(1, len(chunk) - len(ids)))
            chunk[start : start + len(ids)] = ids
        asked = rng.sample(facts, min(config.questions_per_example, len(facts)))
        visible = [fact for fact in asked if self._holds(chunks, fact)] or None
        if visible is None:
            return self._text(rng, "reconstruction") if self.mix["reconstruction"] else self._needle(rng)
        budget = max(2, config.max_candidate_rows // len(chunks))
        queries = [self._fact_query(rng, fact, budget) for fact in visible]
        return Example(tuple(map(tuple, chunks)), tuple(queries), "needle")

    def _holds(self, chunks: Sequence[Sequence[int]], fact: Fact) -> bool:
        ids = self.tokenizer.encode(fact.statement)
        return any(
            list(chunk[at : at + len(ids)]) == ids for chunk in chunks for at in range(len(chunk) - len(ids) + 1)
        )

    def _fact_query(self, rng: random.Random, fact: Fact, most_targets: int) -> Query:
        if rng.random() < 0.5:
            return self._chat_query(fact.question, fact.value, most_targets)
        given = self.tokenizer.encode(f"{fact.question} {fact.lead}")
        targets = self.tokenizer.encode(f" {fact.value}.")[:most_targets]
        return Query((*given, *targets), len(given))

    def _filler(self, rng: random.Random, tokens: int) -> list[int]:
        if rng.random() < 0.5:
            return (self._window(rng, tokens) * 2)[:tokens]
        sentences = re.split(r"(?<=[.!?])\s+", self.long[rng.randrange(len(self.long))][:20000])
        few = [sentence for sentence in sentences if 10 < len(sentence) < 120] or ["Nothing happens here."]
        ids = self.tokenizer.encode(" ".join(rng.choices(few, k=rng.randint(1, 5))) + " ")
        return (ids * (tokens // len(ids) + 1))[:tokens]


SHORT_ANSWER = "Answer with a short phrase."
SYSTEM = "Use the documents."


@dataclass(frozen=True)
class Fact:
    """An invented fact: how it is stated, asked, and begun."""

    statement: str
    question: str
    lead: str
    value: str


_SUBJECTS = [
    *("the north gate", "the blue cabinet", "the archive room", "Mr. Alder", "Dr. Okafor", "Ms. Lindqvist"),
    *("the harbour office", "the greenhouse", "flight deck two", "the old mill", "Professor Tanaka", "the night shift"),
    *("parcel nine", "the reading club", "the pump house", "the Orion project", "Captain Reyes", "the lighthouse"),
    *("the east tunnel", "the museum shop", "the vineyard", "Nurse Petrova", "the tea house", "the clock tower"),
    *("the Falcon team", "the print room", "the ferry", "Aunt Miriam", "the sawmill", "the observatory"),
]
_NUMBERS = [
    *("access number", "locker number", "serial number", "door code", "extension", "ticket number", "combination"),
    "meter reading",
]
_WORDS = ["code word", "favourite colour", "home town", "animal", "password", "nickname"]
_ANSWERS = [
    *("amber", "violet", "Lisbon", "otter", "juniper", "Oslo", "crimson", "falcon", "Nairobi", "walnut", "marble"),
    *("silver", "Kyoto", "badger", "saffron", "Quito", "heron", "cobalt", "thistle", "Geneva", "ivory", "panther"),
    *("Dublin", "maple", "turquoise", "sparrow"),
]


def invent_facts(rng: random.Random, count: int) -> list[Fact]:
    """Invent ``count`` facts about different subjects; they may share their attribute, so they look alike."""
    numeric = rng.random() < 0.7
    attribute = rng.choice(_NUMBERS if numeric else _WORDS)
    facts = []
    for subject in rng.sample(_SUBJECTS, min(count, len(_SUBJECTS))):
        if rng.random() < 0.3:
            attribute = rng.choice(_NUMBERS if numeric else _WORDS)
        digits = rng.choice([3, 4, 5, 5, 6, 7])
        value = str(rng.randrange(10 ** (digits - 1), 10**digits)) if numeric else rng.choice(_ANSWERS)
        named = f"The {attribute} of {subject}"
        if count == 1 and rng.random() < 0.5:
            named = f"The {attribute}"
        statement = rng.choice(
            [
                f" {named} is {value}. ",
                f" {named} is {value}. Keep it in mind: {value}. ",
                f" Please note: {named.lower() if named.isupper() else named} is {value}, that is {value}. ",
            ]
        )
        what = named[0].lower() + named[1:]
        facts.append(Fact(statement, f"What is {what}?", f"{named} is", value))
    return facts


# -- reading ----------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        return str(file.read())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in _read(path).split("\n"):
        if line.strip():
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _sort_row(row: dict[str, Any], texts: list[str], questions: list[QuestionRow]) -> None:
    if isinstance(row.get("question"), str):
        answers = row.get("answers") or ([row["answer"]] if row.get("answer") else [])
        contexts = row.get("ctxs") or [{"title": row.get("title", ""), "text": row.get("context", "")}]
        for context in contexts[:1]:
            held = tuple(str(answer) for answer in answers if str(answer).lower() in context["text"].lower())
            if held:
                questions.append(
                    QuestionRow(row["question"], held, context.get("title", "").replace("_", " "), context["text"])
                )
    elif isinstance(row.get("text"), str):
        texts.append(row["text"])


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, max(low, round(math.exp(rng.uniform(math.log(low), math.log(high + 0.49))))))
