"""Define one evaluation question: documents, the question, and what counts as right.

Every task yields :class:`Trial` and every method answers one; neither knows the other. A trial runs nothing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from focus_core.evaluation.metrics import Wanted
from focus_core.evaluation.suite_metrics import Measure
from focus_core.model.chat import Role
from focus_core.text.corpus import Document

Turn = tuple[Role, str]
"""Who speaks, and what is said."""


@dataclass(frozen=True)
class Trial:
    """One question with known answers.

    Args:
        documents: what memory holds.
        question: the local context.
        answers: the accepted strings.
        gold: id of the document that holds the answer, if one document alone does.
        raw: the question is text to continue, not a chat turn.
        label: what the trial varies, such as its depth.
        wanted: ``any`` of the answers, contained in the text, is right; ``all`` of them have to be there.
        max_tokens: of the answer; ``None`` leaves it to the task.
        measure: how the suite that a trial is of scores an answer, besides what is counted as right.
        prompt: the words in which the base is asked, see :mod:`~focus_core.evaluation.methods.prompts`; ``None`` for
            those that suit it best.
        absent: whether no document holds the answer, where that is asked too; an answer is right then if it declines.
        wrong: strings of which none may be said, such as the other of two that the question names.
        earlier: turns of a conversation before the question; documents hold the same for methods without turns.
    """

    documents: tuple[Document, ...]
    question: str
    answers: tuple[str, ...]
    gold: str | None
    raw: bool
    label: str
    wanted: Wanted = "any"
    max_tokens: int | None = None
    measure: Measure | None = None
    prompt: str | None = None
    absent: bool | None = None
    wrong: tuple[str, ...] = ()
    earlier: tuple[Turn, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Short hash of everything a method sees: equal trials have equal ones."""
        digest = hashlib.sha256(f"{self.raw}\0{self.question}\0{self.answers}".encode())
        for document in self.documents:
            digest.update(f"\0{document.id}\0{document.text}".encode())
        return digest.hexdigest()[:16]

    @property
    def context(self) -> str:
        """Short hash of everything a method sees but digits: trials that differ in a number alone have equal ones."""
        texts = (self.question, *(document.text for document in self.documents))
        return hashlib.sha256(re.sub(r"\d+", "#", "\0".join(texts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Prediction:
    """What a method said.

    Args:
        text: the answer.
        chunks: k, candidates in front of the local rows; 0 for methods without.
        local: tokens of the local context that the answer was read from.
        ranking: document ids, best first, where the method ranks them.
        ids: token ids of the answer, so that it can be cut at a limit.
        supported: probability that the documents hold the answer, where the method says.
    """

    text: str
    chunks: int = 0
    local: int = 0
    ranking: tuple[str, ...] | None = None
    ids: tuple[int, ...] = ()
    supported: float | None = None
