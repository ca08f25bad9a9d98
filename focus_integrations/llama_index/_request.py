"""Take a request apart: what a model's settings and a call's arguments ask for, and what is read for it.

No response is made here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Protocol, cast

from focus_core.answers import AnswerStream
from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.generation import check_cancelled
from focus_core.hardware import free_bytes
from focus_core.model.chat import Message
from focus_core.prompts import Template
from focus_core.session.documents import to_documents
from focus_core.session.engines import Held, MemoryHolder
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document
from focus_integrations.llama_index._messages import to_tool_choice, to_tools

MemorySource = Memory | Callable[[], Memory | None]

_SAMPLING = tuple(field.name for field in fields(DecodeConfig) if field.name != "stop")
CALL_OPTIONS = frozenset([*_SAMPLING, "stop", "documents", "template", "max_sources", "schema", "timeout"])
"""What may be given per call."""


class Settings(Protocol):
    """What a request needs of a ``FocusLLM``, besides the fields that a call may set."""

    template: str
    max_sources: int | None
    stop: list[str] | None
    documents: Any
    memory_path: str | None
    _source: MemorySource | None
    _holder: MemoryHolder

    @property
    def engine(self) -> FocusEngine:
        """The loaded engine."""


class Request:
    """One request: what a model and its arguments ask for."""

    def __init__(self, llm: Settings, kwargs: dict[str, Any], cancelled: threading.Event) -> None:
        given = {name: value for name, value in kwargs.items() if value is not None}
        self.llm, self.engine = llm, llm.engine
        self.cancelled = cancelled
        self.template = given.pop("template", llm.template)
        self.max_sources = kwargs.get("max_sources", llm.max_sources)
        given.pop("max_sources", None)
        given.pop("timeout", None)  # whoever waits looks at it
        self.tools = to_tools(given.pop("tools", ()))
        self.tool_choice = to_tool_choice(given.pop("tool_choice", None), bool(given.pop("tool_required", False)))
        self.offered = [] if self.tool_choice == "none" else self.tools
        self.parallel = bool(given.pop("parallel_tool_calls", given.pop("allow_parallel_tool_calls", True)))
        self.schema = given.pop("schema", None)
        self.documents = to_documents(given.pop("documents", []))
        stop = given.pop("stop", llm.stop) or ()
        self.held = Held(None)
        self.options = {name: given.pop(name, getattr(llm, name)) for name in _SAMPLING}
        self.options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if given:
            known = ", ".join(sorted(CALL_OPTIONS))
            raise ConfigError(f"unknown option {sorted(given)[0]!r}; a call takes {known}")

    def prompt(self, prompt: str) -> AnswerStream:
        """Begin an answer to a prompt of any length."""
        if self.template == "chat" or self.schema is not None:
            return self.conversation([Message("user", prompt)], [])
        head, tail = self.engine.split_prompt(prompt)
        memory = self._hold([Document("prompt", head)] if head.strip() else [])
        template = cast(Template, self.template)
        return self.engine.stream(tail, memory, template=template, cancelled=self.cancelled, **self.options)

    def conversation(self, messages: list[Message], documents: list[Document]) -> AnswerStream:
        """Begin an answer to a conversation of any length."""
        moved, kept = self.engine.fit(messages, self.offered, self.options["max_tokens"])
        return self.engine.chat(
            kept,
            self._hold([*documents, *moved]),
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel=self.parallel,
            schema=self.schema,
            cancelled=self.cancelled,
            **self.options,
        )

    def _hold(self, documents: list[Document]) -> Memory | None:
        """Return what the call reads; documents that calls before it brought along are not computed again."""
        source = self.llm._source
        bound = source() if callable(source) else source
        self.held = self.llm._holder.hold(
            self.engine,
            self.llm.documents if source is None else None,
            bound if source is not None else self.llm.memory_path,
            [*self.documents, *documents],
            check=lambda: check_cancelled(self.cancelled),
        )
        return self.held.memory


def seconds_of(kwargs: Mapping[str, Any], default: float | None) -> float | None:
    """Return the time limit of a call.

    Raises:
        ConfigError: it is no positive number.
    """
    seconds = kwargs.get("timeout", default)
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise ConfigError(f"timeout must be a number of seconds above 0, or None; got {seconds!r}")
    return seconds


def capacity(engine: FocusEngine) -> int:
    """Return the tokens that memory and window hold: half of the memory that is free now, as chunk KV.

    This is what fits, not what an adapter answers well over; docs/experiments.md has what was measured.
    """
    base = engine.base
    per_token = 2 * (base.num_layers - 1) * base.num_kv_heads * base.head_dim * base.dtype.itemsize
    return int(free_bytes(base.device) // 2 // per_token) + engine.config.window
