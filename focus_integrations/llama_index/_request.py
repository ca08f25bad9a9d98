"""Take a request apart: what a model's settings and a call's arguments ask for, and what is read for it.

No response is made here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from focus_core.engine import FocusEngine
from focus_core.generation import check_cancelled
from focus_core.model.chat import Message
from focus_core.prompts import Template
from focus_core.session.arguments import refuse_unknown
from focus_core.session.documents import to_documents
from focus_core.session.engines import Held, MemoryHolder
from focus_core.session.openai import to_choice, to_tools
from focus_core.session.request import SAMPLING, Call, Request, begin, decode_of
from focus_core.store.memory import Memory
from focus_core.store.places import Place
from focus_core.text.corpus import Document

MemorySource = Memory | str | Path | Place | Callable[[], Memory | None]

CALL_OPTIONS = frozenset([*SAMPLING, "stop", "documents", "template", "max_sources", "schema", "timeout"])
"""What may be given per call."""
_CHAT_OPTIONS = frozenset(["tools", "tool_choice", "tool_required", "parallel_tool_calls", "allow_parallel_tool_calls"])


class Settings(Protocol):
    """What a request needs of a ``FocusLLM``, besides the fields that a call may set."""

    template: Template
    documents: Any
    memory: Any
    memory_path: str | None
    _source: MemorySource | None
    _holder: MemoryHolder

    @property
    def engine(self) -> FocusEngine:
        """The loaded engine."""


def start(
    llm: Settings, given: Mapping[str, Any], cancelled: threading.Event, asked: str | list[Message], *carried: Document
) -> Call:
    """Begin an answer.

    Args:
        llm: the model, whose settings stand where the call says nothing.
        given: arguments of the call.
        cancelled: stops it when set.
        asked: a prompt or a conversation, of any length.
        *carried: documents that the conversation's blocks carry.

    Raises:
        ConfigError: an argument is unknown or bad.
    """
    given = {name: value for name, value in given.items() if value is not None}
    refuse_unknown(given, CALL_OPTIONS | _CHAT_OPTIONS, "option")
    template, schema = given.get("template", llm.template), given.get("schema")
    if isinstance(asked, str) and (template == "chat" or schema is not None):
        asked = [Message("user", asked)]
    tools = to_tools(given.get("tools", ()))
    choice = given.get("tool_choice", "auto")
    request = Request(
        decode_of(given, llm),
        messages=() if isinstance(asked, str) else asked,
        text=asked if isinstance(asked, str) else None,
        template=template if isinstance(asked, str) else "chat",
        documents=[*to_documents(given.get("documents", [])), *carried],
        tools=tools,
        choice=to_choice("required" if given.get("tool_required") and choice == "auto" else choice, tools),
        parallel=bool(given.get("parallel_tool_calls", given.get("allow_parallel_tool_calls", True))),
        schema=schema,
    )

    def hold(_: str, documents: list[Any]) -> Held:
        source = llm._source
        bound = source() if callable(source) else source
        return llm._holder.hold(
            llm.engine,
            llm.documents if source is None else None,
            bound if source is not None else llm.memory_path if llm.memory is None else llm.memory,
            documents,
            check=lambda: check_cancelled(cancelled),
        )

    return begin(llm.engine, request, hold, cancelled)
