"""Begin an answer for whoever asks, and say what came of it: one way from clients and frameworks to the engine.

A :class:`Request` is what is asked, whatever form it came in. :func:`begin` moves what does not fit the window to
memory, lets the caller hold what is to be read, and starts the engine; the :class:`Call` is read piece by piece. No
framework is imported here, and no response is made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from focus_core.answers import AnswerStream
from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.generation import Token, check_cancelled
from focus_core.model.chat import Message, Tool
from focus_core.model.tool_calls import ChatDelta, ToolCall, ToolCallParser
from focus_core.prompts import Template
from focus_core.session.citations import Citation, cite
from focus_core.session.engines import Held
from focus_core.text.corpus import Document

SAMPLING = tuple(field.name for field in fields(DecodeConfig) if field.name != "stop")
"""Options of a call that say how an answer is sampled and read."""

Hold = Callable[[str, list[Any]], Held]
"""Given the question and the documents that only this request reads, returns all that is read for it."""


def decode_of(given: Mapping[str, Any], settings: Any) -> DecodeConfig:
    """Return the sampling options of a call.

    Args:
        given: by the call; ``None`` means not given.
        settings: has an attribute for each option that a call does not give.

    Raises:
        ConfigError: one is out of its bounds.
    """
    values = {name: getattr(settings, name) if given.get(name) is None else given[name] for name in (*SAMPLING, "stop")}
    stop = values.pop("stop") or ()
    return DecodeConfig(**values, stop=(stop,) if isinstance(stop, str) else tuple(stop))


def seconds_of(given: Mapping[str, Any], default: float | None) -> float | None:
    """Return the time limit of a call.

    Raises:
        ConfigError: it is no positive number.
    """
    seconds = given.get("timeout", default)
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise ConfigError(f"timeout must be a number of seconds above 0, or None; got {seconds!r}")
    return seconds


@dataclass(frozen=True)
class Request:
    """What is asked.

    Args:
        decode: sampling options.
        messages: of a conversation of any length, oldest first.
        text: a prompt of any length, instead of messages.
        template: how the text, or the last user turn, is put: ``chat``, ``question`` (as the adapter was trained) or
            ``raw`` (texts only).
        documents: read for this request alone.
        tools: what the model may call.
        choice: ``auto``, ``none``, ``required`` or a tool's name.
        parallel: whether several calls may follow each other.
        schema: JSON schema that the answer is held to; ``True`` for any JSON.
    """

    decode: DecodeConfig
    messages: Sequence[Message] = ()
    text: str | None = None
    template: Template = "chat"
    documents: Sequence[Any] = ()
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    parallel: bool = True
    schema: Mapping[str, Any] | bool | None = None

    @property
    def offered(self) -> Sequence[Tool]:
        """Tools that the model is told of."""
        return () if self.choice == "none" else self.tools


@dataclass(frozen=True)
class Piece:
    """What a step added: text or a part of a tool call, and the tokens it is made of."""

    delta: ChatDelta
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Call:
    """A request that is being answered. Whoever reads it closes ``stream``.

    Args:
        engine: that answers.
        request: what is asked.
        stream: the engine's answer.
        held: what is read.
        parser: takes tool calls out of the text; ``None`` where there are none to expect.
    """

    engine: FocusEngine
    request: Request
    stream: AnswerStream
    held: Held
    parser: ToolCallParser | None

    def pieces(self, *, trim: bool = True) -> Iterator[Piece]:
        """Yield text and parts of tool calls.

        Args:
            trim: leave out white space at both ends of the whole; it belongs to a text that is continued.
        """
        held: list[Token] = []

        def texts() -> Iterator[str]:
            for token in self.stream.tokens():
                held.append(token)
                if token.text:
                    yield token.text

        def taken() -> tuple[Token, ...]:
            tokens = tuple(held)
            held.clear()
            return tokens

        for text in _trimmed(texts()) if trim else texts():
            for delta in [ChatDelta(text)] if self.parser is None else self.parser.push(text):
                yield Piece(delta, taken())
        for delta in self.parser.finish() if self.parser is not None else ():
            yield Piece(delta, taken())
        if held:
            yield Piece(ChatDelta(), taken())

    def texts(self) -> Iterator[str]:
        """Yield the text alone, without white space at either end; what is no whole call is text where it stood."""
        return _trimmed(self._texts())

    def _texts(self) -> Iterator[str]:
        if self.parser is None:
            yield from self.stream
            return
        known = 0
        for piece in self.stream:
            yield from (delta.text for delta in self.parser.push(piece) if delta.text)
            for call in self.parser.broken[known:]:
                yield call.written
            known = len(self.parser.broken)
        yield from (delta.text for delta in self.parser.finish() if delta.text)
        yield from (call.written for call in self.parser.broken[known:])

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Tool calls that were read so far."""
        return tuple(self.parser.calls) if self.parser is not None else ()

    @property
    def broken(self) -> str:
        """Text of what began as a tool call and did not end as one."""
        return "\n".join(call.written for call in self.parser.broken) if self.parser is not None else ""

    @property
    def reason(self) -> str:
        """Why the answer ended: ``stop``, ``length``, ``tool_calls`` or ``cancelled``."""
        return "tool_calls" if self.calls else self.stream.answer.finish_reason

    @property
    def computed(self) -> int:
        """Tokens of the memory whose chunk KV was computed for this request."""
        return min(self.held.created, self.stream.answer.usage.memory)

    def citations(self, limit: int) -> list[Citation]:
        """Return at most ``limit`` citations of the answer, best first; none of one that calls tools."""
        return [] if self.calls else cite(self.stream.answer, self.stream.documents, limit)


def begin(engine: FocusEngine, request: Request, hold: Hold, cancelled: threading.Event) -> Call:
    """Begin an answer of any length of conversation or text.

    Raises:
        CancelledError: nobody waits for it any more.
        ConfigError: an option, a tool or the schema is bad, or nothing is asked.
        ContextTooLongError: the last turn with the tools does not fit the window.
    """
    check_cancelled(cancelled)
    stream, held = (_conversation if request.text is None else _text)(engine, request, hold, cancelled)
    return Call(engine, request, stream, held, ToolCallParser() if request.offered else None)


def _text(engine: FocusEngine, request: Request, hold: Hold, cancelled: threading.Event) -> tuple[AnswerStream, Held]:
    text = request.text or ""
    room = engine.config.window - request.decode.max_tokens - 1
    head, tail = engine.split_prompt(text, max(1, room)) if request.template == "raw" else engine.split_prompt(text)
    held = hold(tail, [*request.documents, *([Document("prompt", head)] if head.strip() else [])])
    stream = engine.stream(tail, held.memory, template=request.template, decode=request.decode, cancelled=cancelled)
    return stream, held


def _conversation(
    engine: FocusEngine, request: Request, hold: Hold, cancelled: threading.Event
) -> tuple[AnswerStream, Held]:
    messages = list(request.messages)
    if not messages:
        raise ConfigError("the question is empty: there is no message; ask something")
    question = next((message.content for message in reversed(messages) if message.role == "user"), "")
    if request.template == "raw":
        raise ConfigError("template 'raw' has no turns; give a text instead of messages for it")
    if request.template == "question" and messages and messages[-1].role == "user":
        put = engine.info.question_template.replace("{question}", messages[-1].content)
        messages[-1] = replace(messages[-1], content=put)
    moved, kept = engine.fit(messages, request.offered, request.decode.max_tokens)
    held = hold(question, [*request.documents, *moved])
    stream = engine.chat(
        kept,
        held.memory,
        tools=request.tools,
        tool_choice=request.choice,
        parallel=request.parallel,
        schema=request.schema,
        decode=request.decode,
        cancelled=cancelled,
    )
    return stream, held


def _trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces without the white space at both ends of the whole, so that streams add up to ``answer.text``."""
    held, begun = "", False
    for piece in pieces:
        held += piece if begun else piece.lstrip()
        ready = held.rstrip()
        if ready:
            begun = True
            held = held[len(ready) :]
            yield ready
