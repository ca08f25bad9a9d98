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

from focus_core.answers import Answer, AnswerStream
from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import CancelledError, ConfigError
from focus_core.generation import Token, check_cancelled
from focus_core.model.chat import ChatDelta, Message, Tool, ToolCall, ToolCallParser, render_messages
from focus_core.server.access import Caller
from focus_core.server.admission import Admission
from focus_core.server.memories import Memories
from focus_core.server.metrics import Metrics
from focus_core.session import concurrency
from focus_core.session.citations import AttentionMap, Citation, attention_map, cite
from focus_core.session.pieces import trimmed
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document

STANDARD_CITATIONS = 3


@dataclass(frozen=True)
class Job:
    """One answer to be made.

    Args:
        messages: of the conversation, oldest first; empty for a text to be continued.
        decode: sampling options.
        text: to be continued, where there are no messages.
        documents: attached to the request; read for it alone.
        memories: names of the memories to read.
        wanted: metadata or ids of the documents to read of them.
        tools: what the model may call.
        choice: ``auto``, ``none``, ``required`` or a tool's name.
        parallel: whether several calls may follow each other.
        schema: what the answer is held to.
        question: put the last turn as the adapter was trained.
        citations: most citations.
        attention: also return where the model looked.
        user: whom the request is for; the queue is fair between callers and users.
    """

    messages: Sequence[Message]
    decode: DecodeConfig
    text: str = ""
    documents: Sequence[Document] = ()
    memories: Sequence[str] = ()
    wanted: Mapping[str, Any] | Sequence[str] | None = None
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    parallel: bool = True
    schema: Mapping[str, Any] | bool | None = None
    question: bool = False
    citations: int = STANDARD_CITATIONS
    attention: bool = False
    user: str = ""


@dataclass(frozen=True)
class Piece:
    """What a step added: text or a part of a tool call, and the tokens it is made of."""

    delta: ChatDelta
    tokens: tuple[Token, ...] = ()


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
    """

    text: str
    answer: Answer
    reason: str
    calls: tuple[ToolCall, ...] = ()
    citations: tuple[Citation, ...] = ()
    attention: AttentionMap | None = None
    stop: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens read: of the conversation and of all chunks."""
        return self.answer.usage.local + self.answer.usage.memory


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
        for name in job.memories:
            self.memories.require(caller.tenant, name)
        texts = [job.text, *(message.content for message in job.messages), *(one.text for one in job.documents)]
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
        with self.metrics.request():
            try:
                async with asyncio.timeout(self.seconds), self.admission.admitted(client, nbytes):
                    self.metrics.waited(time.monotonic() - started)
                    pieces = concurrency.iterate(lambda cancelled: self._pieces(caller, job, cancelled))
                    async with aclosing(pieces):  # type: ignore[type-var]
                        async for piece in pieces:
                            if isinstance(piece, Finished):
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
            memory = self._memory(caller, job, cancelled)
            stream = self._stream(job, memory, cancelled)
            parser = ToolCallParser() if job.tools and job.choice != "none" else None
            with stream:
                text = ""
                for piece in _deltas(stream, parser):
                    text += piece.delta.text
                    yield piece
            yield self._finished(job, stream, text, parser)
        finally:
            self._running.discard(cancelled)

    def _memory(self, caller: Caller, job: Job, cancelled: threading.Event) -> Memory | None:
        """Return what the request reads: its memories as far as they are wanted, and its documents."""

        def check() -> None:
            check_cancelled(cancelled)

        memory = self.memories.open(caller.tenant, job.memories, job.wanted, check) if job.memories else None
        if job.documents:
            held = [] if memory is None else [document.id for document in memory.documents]
            memory = memory.subset(held) if memory is not None else self.engine.remember([])
            memory.add(job.documents, check=check)
        return memory

    def _stream(self, job: Job, memory: Memory | None, cancelled: threading.Event) -> AnswerStream:
        if not job.messages:
            return self.engine.stream(job.text, memory, template="raw", decode=job.decode, cancelled=cancelled)
        messages = list(job.messages)
        if job.question and messages[-1].role == "user":
            asked = self.engine.info.question_template.replace("{question}", messages[-1].content)
            messages[-1] = Message("user", asked)
        return self.engine.chat(
            messages,
            memory,
            tools=job.tools,
            tool_choice=job.choice,
            parallel=job.parallel,
            schema=job.schema,
            decode=job.decode,
            cancelled=cancelled,
        )

    def _finished(self, job: Job, stream: AnswerStream, text: str, parser: ToolCallParser | None) -> Finished:
        answer = stream.answer
        if answer.finish_reason == "cancelled":
            raise CancelledError("the answer was cancelled")
        calls = tuple(parser.calls) if parser is not None else ()
        reason = "tool_calls" if calls else answer.finish_reason
        found = cite(answer, stream.documents, job.citations) if text.strip() and not calls else []
        looked = attention_map(answer, stream.documents) if job.attention else None
        return Finished(text.strip(), answer, reason, calls, tuple(found), looked, answer.stopped_by)

    def _suffix_bytes(self, caller: Caller, job: Job) -> int:
        """Return the bytes that the answer's suffixes will take: what a request costs beside the chunk KV it shares."""
        base, config = self.engine.base, self.engine.config
        row = 2 * (base.num_layers - 1) * base.num_kv_heads * base.head_dim * base.dtype.itemsize
        texts = [job.text, *(message.content for message in job.messages)]
        prompt = min(config.prompt_length, sum(len(text) for text in texts))
        chunks = self.memories.chunks(caller.tenant, job.memories)
        chunks += sum(1 + len(one.text) // config.chunk_size for one in job.documents)
        return int(chunks * (prompt + job.decode.max_tokens) * row)


def _deltas(stream: AnswerStream, parser: ToolCallParser | None) -> Iterator[Piece]:
    """Yield text and parts of tool calls, without white space at either end of the whole."""
    held: list[Token] = []

    def texts() -> Iterator[str]:
        for token in stream.tokens():
            held.append(token)
            if token.text:
                yield token.text

    def taken() -> tuple[Token, ...]:
        tokens = tuple(held)
        held.clear()
        return tokens

    if parser is None:
        for text in trimmed(texts()):
            yield Piece(ChatDelta(text), taken())
    else:
        for text in texts():
            for delta in parser.push(text):
                yield Piece(delta, taken())
        for delta in parser.finish():
            yield Piece(delta, taken())
    if held:
        yield Piece(ChatDelta(), taken())
