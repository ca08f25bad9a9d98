"""Write tool calls as the model does, and read them back out of what it writes, as it arrives.

Calls are ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` (Hermes style). Text that is no whole call comes
back as text, so nothing that the model wrote is lost.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class BrokenCall:
    """What a model began as a call and did not end as one.

    Args:
        id: names it as a call's id would.
        name: of the tool.
        arguments: what stands for them, no JSON object unless ``rest`` is at fault.
        rest: what was written behind them.
    """

    id: str
    name: str
    arguments: str
    rest: str = ""

    @property
    def written(self) -> str:
        """The text that the model wrote, white space in front of the arguments aside."""
        head = f'{CALL_OPEN}\n{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": '
        return head + self.arguments + self.rest


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Args:
        id: names the call, so that a result can be matched to it.
        name: of the tool.
        arguments: by parameter name.
    """

    id: str
    name: str
    arguments: dict[str, Any]


def write_tool_call(call: ToolCall) -> str:
    """Return a call as the model writes it."""
    body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


@dataclass(frozen=True)
class ChatDelta:
    """What a piece of model output adds to the assistant's message.

    Args:
        text: of the content; empty for pieces of a call.
        index: number of the call this piece belongs to, ``None`` for text.
        id: of the call; on its first piece only.
        name: of the tool; on the call's first piece only.
        arguments: characters of the call's arguments, a part of a JSON object.
    """

    text: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class ToolCallParser:
    """Reads tool calls out of model output as it arrives.

    Text that is no well-formed call comes back as text.

    Args:
        request: names the request: a call's id depends on it and the call's number. Drawn anew if not given, so that no
            two calls have the same id.
    """

    def __init__(self, request: str | None = None) -> None:
        self.request = request if request is not None else uuid.uuid4().hex
        self.calls: list[ToolCall] = []
        self.broken: list[BrokenCall] = []
        """Calls that ended too early, whose arguments are no JSON object, or that have something else behind them."""
        self._held = ""
        self._read: Callable[[], list[ChatDelta] | None] = self._read_text
        self._count = 0
        self._name, self._arguments = "", ""
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> list[ChatDelta]:
        """Add output and return what became certain."""
        self._held += text
        found: list[ChatDelta] = []
        while (deltas := self._read()) is not None:
            found += deltas
        return found

    def finish(self) -> list[ChatDelta]:
        """Return what was held back; the output has ended."""
        held, self._held = self._held, ""
        if self._read == self._read_text:
            return [ChatDelta(held)] if held else []
        if self._read == self._read_head:
            return self._whole(held, CALL_OPEN + held)
        if self._read == self._read_arguments:
            self.broken.append(BrokenCall(self._id(), self._name, self._arguments))
        if self._read == self._read_tail:
            size = max(size for size in range(len(CALL_CLOSE)) if held.endswith(CALL_CLOSE[:size]))
            self._end_call(held[: len(held) - size], CALL_CLOSE[:size])  # the end may be cut off
        return []

    def _read_text(self) -> list[ChatDelta] | None:
        before, opened, after = self._held.partition(CALL_OPEN)
        if opened:
            self._held, self._read = after, self._read_head
            return [ChatDelta(before.rstrip())] if before.strip() else []
        sure = len(self._held.rstrip())
        for size in range(min(len(CALL_OPEN) - 1, sure), 0, -1):
            if self._held[:sure].endswith(CALL_OPEN[:size]):
                sure = len(self._held[: sure - size].rstrip())
                break
        text, self._held = self._held[:sure], self._held[sure:]
        return [ChatDelta(text)] if text else None

    def _read_head(self) -> list[ChatDelta] | None:
        match = _HEAD.match(self._held)
        name = _parsed(match[1]) if match is not None else None
        if match is not None and isinstance(name, str):
            self._name, self._arguments = name, ""
            self._held, self._read = self._held[match.end() :], self._read_arguments
            return [ChatDelta(index=self._count, id=self._id(), name=self._name)]
        body, closed, after = self._held.partition(CALL_CLOSE)
        if not closed:
            return None
        self._held, self._read = after, self._read_text
        return self._whole(body, CALL_OPEN + body + CALL_CLOSE)

    def _read_arguments(self) -> list[ChatDelta] | None:
        for at, character in enumerate(self._held):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "]}":
                self._depth -= 1
                if self._depth == 0:
                    return self._end_arguments(at + 1)
        return self._take(len(self._held)) if self._held else None

    def _take(self, length: int) -> list[ChatDelta]:
        piece, self._held = self._held[:length], self._held[length:]
        self._arguments += piece
        return [ChatDelta(index=self._count, arguments=piece)]

    def _end_arguments(self, length: int) -> list[ChatDelta]:
        self._read = self._read_tail
        return self._take(length)

    def _read_tail(self) -> list[ChatDelta] | None:
        rest, closed, after = self._held.partition(CALL_CLOSE)
        if not closed:
            return None
        self._held, self._read = after.lstrip("\n"), self._read_text
        self._end_call(rest, closed)
        return []

    def _end_call(self, rest: str, closed: str = "") -> None:
        """Take what stands behind the arguments: nothing, the end of the object, or what makes it no call."""
        arguments = _object(self._arguments)
        if arguments is None or (rest.strip() and _object(f'{{"arguments": {{}}{rest}') is None):
            self.broken.append(BrokenCall(self._id(), self._name, self._arguments, rest + closed))
        else:
            self.calls.append(ToolCall(self._id(), self._name, arguments))
        self._count += 1

    def _whole(self, body: str, raw: str) -> list[ChatDelta]:
        """Read a block that is not in the usual order at once; what is no call is text."""
        found = _object(body) or {}
        arguments = found.get("arguments", found.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
            return [ChatDelta(raw)]
        call = ToolCall(self._id(), found["name"], arguments)
        self.calls.append(call)
        self._count += 1
        written = json.dumps(arguments, ensure_ascii=False)
        return [ChatDelta(index=self._count - 1, id=call.id, name=call.name, arguments=written)]

    def _id(self) -> str:
        digest = hashlib.sha256(f"{self.request}\0{self._count}".encode()).hexdigest()
        return f"call_{digest[:24]}"


def _object(text: str) -> dict[str, Any] | None:
    value = _parsed(text)
    return value if isinstance(value, dict) else None


def _parsed(text: str) -> Any:
    """Return a JSON value; ``None`` for what is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
