"""Translate LangChain messages to the core's and back.

``text-plain`` and ``file`` blocks of a message become documents for memory; other media are refused by name. Citations
of an answer travel in ``response_metadata`` and appear as standard annotations in ``content_blocks``: langchain-core
asks the translator registered here for them. Nothing is generated here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.block_translators import register_translator

from focus_core.errors import ConfigError
from focus_core.model.chat import Message, Role
from focus_core.model.tool_calls import ToolCall
from focus_core.session.attachments import attached_document
from focus_core.text.corpus import Document
from focus_integrations.langchain._model import PROVIDER

_CLASSES: dict[type[BaseMessage], Role] = {
    HumanMessage: "user",
    AIMessage: "assistant",
    SystemMessage: "system",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}
_SILENT = (
    "tool_use",
    "tool_call_chunk",
    "server_tool_use",
    "server_tool_call_chunk",
    "reasoning",
    "thinking",
    "redacted_thinking",
    "refusal",
    "citation",
    "non_standard",
)
"""Blocks that may say nothing here: what providers keep of their own work, besides their calls and results."""


def to_messages(messages: Sequence[BaseMessage]) -> tuple[list[Message], list[Document]]:
    """Translate a conversation; returns its messages and the documents that were attached to them.

    Raises:
        ConfigError: a role is unknown, or a message holds media that are no text.
        NotTextError: an attached file is not UTF-8 text.
    """
    documents: list[Document] = []
    found = [_to_message(message, documents) for message in messages]
    return found, documents


def _to_message(message: BaseMessage, documents: list[Document]) -> Message:
    role = _role(message)
    content = _text(message.content, documents)
    if isinstance(message, AIMessage):
        calls = tuple(ToolCall(call["id"] or "", call["name"], dict(call["args"])) for call in message.tool_calls)
        return Message("assistant", content, calls)
    if isinstance(message, ToolMessage):
        said = f"Error: {content}" if message.status == "error" else content
        return Message("tool", said, tool_call_id=message.tool_call_id, name=message.name)
    return Message(role, content, name=message.name if role == "tool" else None)


def _role(message: BaseMessage) -> Role:
    known = next((role for kind, role in _CLASSES.items() if isinstance(message, kind)), None)
    said = message.role if isinstance(message, ChatMessage) else message.type
    role = known or _ROLES.get(said.lower())
    if role is None:
        raise ConfigError(f"a message has the unknown role {said!r}; use one of {', '.join(_ROLES)}")
    return role


def _text(content: str | Sequence[Any], documents: list[Document]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(text for block in content if (text := _block(block, documents)) is not None)


def _block(block: Any, documents: list[Document]) -> str | None:
    """Return what a block says, or ``None`` where it says nothing; attached documents are put aside."""
    if isinstance(block, str):
        return block
    if not isinstance(block, Mapping):
        raise ConfigError(f"a message's content must be text or blocks; got {type(block).__name__}")
    kind = block.get("type", "text")
    if kind in ("text-plain", "file"):
        document = _document(block)
        if document.text.strip():
            documents.append(document)
        return f"[{document.id}]"
    for name in ("text", "refusal", "json", "output", "content") if kind != "reasoning" else ():
        said = block.get(name)
        if isinstance(said, (list, tuple)) and any(isinstance(one, Mapping) and "type" in one for one in said):
            return _text(said, documents)
        if said is not None:
            return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)
    if kind in _SILENT or kind.endswith(("_call", "_result")):
        return None
    raise ConfigError(f"this model reads text only; got a block of type {kind!r}; leave it out")


def _document(block: Mapping[str, Any]) -> Document:
    """Return the document of a ``text-plain`` or ``file`` block."""
    text, data, mime = block.get("text"), block.get("base64"), block.get("mime_type")
    extras = block.get("extras") or {}
    title = block.get("title") or block.get("filename") or extras.get("title") or extras.get("filename")
    known = {key: block[key] for key in ("title", "context", "url") if block.get(key)}
    if text is None and data is not None:
        document = attached_document(str(title) if title else None, data, mime)
        return replace(document, metadata={**document.metadata, **known})
    if not isinstance(text, str):
        raise ConfigError(
            f"an attached document needs 'text' or 'base64'; got {', '.join(sorted(block))}; read it first"
        )
    name = title or f"attachment-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Document(str(name), text, known)


# -- content blocks of answers ----------------------------------------------------------------------------------


def _blocks(message: Any, calls: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    if not isinstance(message.content, str):
        raise NotImplementedError  # content that is blocks already is read by langchain-core itself
    found: list[Any] = []
    cited = message.response_metadata.get("citations") or []
    if message.content or cited:
        found.append({"type": "text", "text": message.content, **({"annotations": cited} if cited else {})})
    for call in calls:
        block = {"type": kind, "id": call.get("id"), "name": call.get("name"), "args": call.get("args")}
        found.append(block | ({"index": call["index"]} if call.get("index") is not None else {}))
    return found


def _translate(message: Any) -> list[Any]:
    broken = [{"type": "invalid_tool_call", **call} for call in message.invalid_tool_calls]
    return [*_blocks(message, message.tool_calls, "tool_call"), *broken]


def _translate_chunk(message: Any) -> list[Any]:
    if message.chunk_position == "last":
        return _translate(message)
    return _blocks(message, message.tool_call_chunks, "tool_call_chunk")


register_translator(PROVIDER, _translate, _translate_chunk)
