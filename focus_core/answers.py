"""Hold an answer, whole or in pieces, with where it came from and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from torch import Tensor

from focus_core.generation import Generation, Token
from focus_core.method.attribution import Evidence, chunk_evidence, document_evidence
from focus_core.method.state import MemoryState
from focus_core.method.support import supported
from focus_core.text.corpus import Document


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Args:
        local: of the question as the model saw it.
        memory: of all chunks read.
        generated: of the answer, its end token included.
        chunks: k.
        reread: of the chunks read whole (``DecodeConfig.reread``).
        kept: chunks that the answer was read from, whole or by their candidates (``DecodeConfig.chunk_top_p``).
    """

    local: int
    memory: int
    generated: int
    chunks: int
    reread: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer and where it came from.

    Args:
        text: the answer.
        finish_reason: ``stop``, ``length`` or ``cancelled``.
        evidence: documents, best first; scores add up to 1.
        passages: chunks, best first; scores add up to 1.
        usage: token counts.
        tokens: generated tokens with their log-probabilities.
        supported: calibrated probability that the memory holds an answer, in [0, 1]; ``None`` without a memory and for
            adapters that it was not calibrated for.
        support_features: what it is computed from, see :mod:`focus_core.method.support`.
        attention: (tokens, k) attention on each chunk's candidate, in memory order.
        attention_by_head: (layers, heads, k) the same summed over tokens, for every head.
        stopped_by: the stop string that ended it, if one did.
    """

    text: str
    finish_reason: str
    evidence: list[Evidence]
    passages: list[Evidence]
    usage: Usage
    tokens: list[Token]
    attention: Tensor = field(repr=False)
    attention_by_head: Tensor = field(repr=False)
    stopped_by: str | None = None
    supported: float | None = None
    support_features: tuple[float, ...] = field(default=(), repr=False)


class AnswerStream:
    """Pieces of an answer as they are made; :attr:`answer` is there when the stream has ended.

    Closing it (also by leaving a ``with``) or :meth:`cancel` stops the work within one layer.
    """

    def __init__(
        self, generation: Generation, local: list[int], state: MemoryState, support: Sequence[float] = ()
    ) -> None:
        self._generation, self._state, self._support = generation, state, support
        self._source = generation.tokens(local)
        self._tokens: list[Token] = []
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        for token in self.tokens():
            if token.text:
                yield token.text

    def tokens(self) -> Iterator[Token]:
        """Yield tokens instead of text."""
        for token in self._source:
            self._tokens.append(token)
            yield token

    @property
    def documents(self) -> Mapping[str, Document]:
        """What is being read, by id."""
        return self._state.documents

    def cancel(self) -> None:
        """Stop as soon as possible; may be called from another thread."""
        self._generation.cancelled.set()

    def close(self) -> None:
        """Stop, keeping what was made so far as the answer; an answer that is complete stays as it is."""
        if self._generation.finish_reason is None:
            self.cancel()
        self._source.close()  # type: ignore[attr-defined]
        if self._generation.finish_reason is None:
            self._generation.finish_reason = "cancelled"

    @property
    def answer(self) -> Answer:
        """The whole answer; what is left of the stream is read first."""
        for _ in self.tokens():
            pass
        if self._answer is None:
            self._answer = self._finish()
        return self._answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self) -> Answer:
        generation, state = self._generation, self._state
        passages = chunk_evidence(generation.record.scores(), state.chunks, state.documents)
        usage = Usage(
            local=generation.prompt_tokens,
            memory=sum(len(chunk.ids) for chunk in state.chunks),
            generated=len(generation.generated),
            chunks=len(state.chunks),
            reread=generation.reading.reread_tokens,
            kept=generation.reading.candidates,
        )
        return Answer(
            text="".join(token.text for token in self._tokens).strip(),
            finish_reason=generation.finish_reason or "cancelled",
            evidence=document_evidence(passages),
            passages=passages,
            usage=usage,
            tokens=self._tokens,
            attention=generation.record.steps(),
            attention_by_head=generation.record.by_head(),
            stopped_by=generation.stopped_by,
            supported=supported(generation.support_features, self._support),
            support_features=generation.support_features,
        )
