"""Run one answer for one request: admitted, in a thread of its own, stopped when nobody listens or the time is over.

Everything interface-specific is left to the callers; what they get is a stream of :class:`Piece` and one
:class:`Finished`. Nothing here knows HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from focus_core.answers import Answer
from focus_core.engine import FocusEngine
from focus_core.errors import CancelledError, ConfigError
from focus_core.generation import check_cancelled
from focus_core.method.encoding import kv_shape
from focus_core.method.suffix import suffix_bytes
from focus_core.model.chat import Message, Tool, render_messages
from focus_core.model.tool_calls import ToolCall
from focus_core.server.access import Caller
from focus_core.server.admission import Admission
from focus_core.server.memories import Memories
from focus_core.server.metrics import Metrics
from focus_core.session import concurrency
from focus_core.session.citations import STANDARD_CITATIONS, AttentionMap, Citation, attention_map
from focus_core.session.engines import Held, holding
from focus_core.session.request import Call, Piece, Request, begin
from focus_core.text.corpus import Document


@dataclass(frozen=True)
class Job:
    """One answer to be made.

    Args:
        request: what is asked; its documents are those attached to it.
        memories: names of the memories to read.
        wanted: metadata or ids of the documents to read of them.
        citations: most citations.
        attention: also return where the model looked.
        user: whom the request is for; the queue is fair between callers and users.
    """

    request: Request
    memories: Sequence[str] = ()
    wanted: Mapping[str, Any] | Sequence[str] | None = None
    citations: int = STANDARD_CITATIONS
    attention: bool = False
    user: str = ""

    @property
    def texts(self) -> list[str]:
        """Everything that the request itself brings to be read, attached documents last."""
        said = [message.content for message in self.request.messages]
        return [self.request.text or "", *said, *(one.text for one in self.request.documents)]


@dataclass(frozen=True)
class Finished:
    """A whole answer.

    Args:
        text: without tool calls.
        answer: as the engine gave it.
        reason: ``stop``, ``length``, ``tool_calls`` or ``cancelled``.
        calls: tool calls in it.
        citations: of the text.
        attention: of its words, if it was asked for.
        stop: the stop string that ended it, if one did.
        computed: tokens of the memory whose chunk KV was computed for this answer.
    """

    text: str
    answer: Answer
    reason: str
    calls: tuple[ToolCall, ...] = ()
    citations: tuple[Citation, ...] = ()
    attention: AttentionMap | None = None
    stop: str | None = None
    computed: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens read: of the conversation and of all chunks."""
        return self.answer.usage.local + self.answer.usage.memory

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose chunk KV was there already."""
        return self.answer.usage.memory - self.computed


@dataclass
class Answering:
    """Makes answers over one engine.

    Args:
        engine: reads and answers.
        memories: named memories.
        admission: bounds what runs at once.
        metrics: counts.
        seconds: most seconds of an answer, waiting included.
        prompt_tokens: most tokens of a request's own texts.
    """

    engine: FocusEngine
    memories: Memories
    admission: Admission
    metrics: Metrics
    seconds: float
    prompt_tokens: int
    _running: set[threading.Event] = field(default_factory=set)

    def check(self, caller: Caller, job: Job) -> None:
        """Refuse what cannot be answered before anything waits or is streamed.

        Raises:
            ConfigError: an option is bad, or the texts are longer than the server takes.
            ApiError: a memory is not there.
        """
        if job.wanted is not None and not job.memories:
            raise ConfigError("memory_filter needs memories that it chooses from; name some, or leave it out")
        for name in job.memories:
            self.memories.check(caller.tenant, name)
        texts = job.texts
        if sum(map(len, texts)) > 16 * self.prompt_tokens:
            count = self.prompt_tokens + 1
        else:
            count = sum(self.engine.count_tokens(text) for text in texts if text)
        if count > self.prompt_tokens:
            raise ConfigError(
                f"the request's texts have more than {self.prompt_tokens:,} tokens, which is what this server takes; "
                "put long texts into a memory"
            )

    async def run(self, caller: Caller, job: Job) -> AsyncIterator[Piece | Finished]:
        """Make an answer; closing the iterator stops it within one step.

        Raises:
            QueueFullError: too many wait already.
            TimeoutError: it took too long.
            FocusError: the engine refused it.
        """
        nbytes = await asyncio.to_thread(self._suffix_bytes, caller, job)
        client = f"{caller.name}\0{job.user}"
        started = time.monotonic()
        with self.metrics.request() as done:
            try:
                async with asyncio.timeout(self.seconds), self.admission.admitted(client, nbytes):
                    self.metrics.waited(time.monotonic() - started)
                    pieces = concurrency.iterate(lambda cancelled: self._pieces(caller, job, cancelled))
                    async with aclosing(pieces):  # type: ignore[type-var]
                        async for piece in pieces:
                            if isinstance(piece, Finished):
                                done()  # whoever has this much may close the iterator
                                self.metrics.answered(piece)
                            yield piece
            except TimeoutError as error:
                raise TimeoutError(
                    f"the answer took more than {self.seconds:g} seconds and was stopped; ask for fewer tokens"
                ) from error

    def count(self, messages: Sequence[Message], tools: Sequence[Tool], documents: Sequence[Document]) -> int:
        """Return the tokens of a conversation as the model reads it."""
        said = self.engine.with_system(messages)
        attached = sum(self.engine.count_tokens(document.text) for document in documents)
        return len(render_messages(self.engine.tokenizer, said, tools)) + attached

    def cancel_all(self) -> None:
        """Stop every running answer within one step."""
        for event in list(self._running):
            event.set()

    # -- in the answer's thread -----------------------------------------------------------------------------------

    def _pieces(self, caller: Caller, job: Job, cancelled: threading.Event) -> Iterator[Piece | Finished]:
        self._running.add(cancelled)
        try:
            call = begin(self.engine, job.request, lambda _, more: self._held(caller, job, more, cancelled), cancelled)
            with call.stream:
                text = ""
                for piece in call.pieces(trim=job.request.template != "raw"):
                    text += piece.delta.text
                    yield piece
            yield _finished(job, call, text)
        finally:
            self._running.discard(cancelled)

    def _held(self, caller: Caller, job: Job, more: Sequence[Document], cancelled: threading.Event) -> Held:
        """Return what the request reads: its memories as far as they are wanted, and documents of its own."""

        def check() -> None:
            check_cancelled(cancelled)

        memory = self.memories.open(caller.tenant, job.memories, job.wanted, check) if job.memories else None
        return holding(self.engine, memory, check)("", more)

    def _suffix_bytes(self, caller: Caller, job: Job) -> int:
        """Return the bytes that the answer's suffixes will take: what a request costs beside the chunk KV it shares."""
        config = self.engine.config
        attached = [len(one.text) for one in job.request.documents]
        prompt = min(config.prompt_length, sum(map(len, job.texts)) - sum(attached))
        chunks = self.memories.chunks(caller.tenant, job.memories)
        chunks += sum(1 + length // config.chunk_size for length in attached)
        return suffix_bytes(kv_shape(self.engine.base), chunks, prompt + job.request.decode.max_tokens)


def _finished(job: Job, call: Call, text: str) -> Finished:
    answer = call.stream.answer
    if answer.finish_reason == "cancelled":
        raise CancelledError("the answer was cancelled")
    before = 0
    if job.request.template == "raw":
        before = len(text) - len(text.lstrip())
    else:
        text = "\n".join(filter(None, [text.strip(), call.broken]))  # what is no call is not lost
    found = tuple(one.moved(before) for one in call.citations(job.citations)) if text else ()
    looked = attention_map(answer, call.stream.documents).moved(before) if job.attention else None
    return Finished(text, answer, call.reason, call.calls, found, looked, answer.stopped_by, call.computed)
