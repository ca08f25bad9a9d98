"""Read conversations and tools in OpenAI's form, which servers and frameworks send alike.

Attached files become documents for memory; media that are no text are refused by name. Nothing is generated here, and
no client library is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from focus_core.errors import ConfigError
from focus_core.model.chat import Message, Role, Tool
from focus_core.model.tool_calls import ToolCall
from focus_core.session.attachments import attached_document
from focus_core.text.corpus import Document

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def to_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[Document]]:
    """Return a conversation's messages and the documents that were attached to them.

    Raises:
        ConfigError: a role is unknown, a tool call is malformed, or a part holds media that are no text.
        NotTextError: an attached file holds no text.
    """
    documents: list[Document] = []
    return [_to_message(message, documents) for message in messages], documents


def to_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Return tools given as ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    Raises:
        ConfigError: one is not of that form.
    """
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not function.get("name"):
            raise ConfigError(f"a tool must be a function in OpenAI's form; got {tool!r}")
        parameters = function.get("parameters")
        schema = {"type": "object", "properties": {}} if parameters is None else parameters
        found.append(Tool(str(function["name"]), str(function.get("description") or ""), schema))
    return found


def to_choice(choice: Any, tools: Sequence[Tool]) -> str:
    """Return every form of ``tool_choice`` as ``auto``, ``none``, ``required`` or a tool's name.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else choice.get("name", choice.get("type"))
    if choice is None or choice == "auto":
        return "auto"
    if choice is False or choice == "none":
        return "none"
    if choice is True or choice in ("any", "required"):
        return "required"
    if choice in [tool.name for tool in tools]:
        return str(choice)
    names = ", ".join(tool.name for tool in tools) or "no tools"
    raise ConfigError(f"tool_choice {choice!r} is none of auto, none, any, required, True or a tool's name ({names})")


def to_schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the JSON schema that a ``response_format`` holds the answer to, if any.

    Raises:
        ConfigError: its type is unknown, or it has no schema.
    """
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if isinstance(schema, Mapping):
            return schema
        raise ConfigError(f"response_format of type json_schema needs json_schema.schema; got {described!r}")
    raise ConfigError(f"response_format must be of type text, json_object or json_schema; got {kind!r}")


def _to_message(message: Mapping[str, Any], documents: list[Document]) -> Message:
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise ConfigError(f"a message's role must be one of {', '.join(_ROLES)}; got {message.get('role')!r}")
    calls = tuple(_to_call(call) for call in message.get("tool_calls") or ())
    content = _text(message.get("content"), documents)
    name = message.get("name") if role == "tool" else None
    return Message(role, content, calls, message.get("tool_call_id"), name)


def _to_call(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise ConfigError(f"a tool call needs a function with a name; got {call!r}")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the arguments of a tool call must be a JSON object as text ({error})") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f"the arguments of a tool call must be a JSON object; got {function.get('arguments')!r}")
    return ToolCall(str(call.get("id") or ""), str(function["name"]), arguments)


def _text(content: Any, documents: list[Document]) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ConfigError(f"a message's content must be text or a list of parts; got {type(content).__name__}")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            pieces.append(part["refusal"])
        elif kind == "file" and isinstance(part.get("file"), Mapping):
            documents.append(_attached(part["file"]))
            pieces.append(f"[{documents[-1].id}]")
        else:
            raise ConfigError(f"this model reads text only; got a part of type {kind!r}; leave it out")
    return "\n".join(pieces)


def _attached(file: Mapping[str, Any]) -> Document:
    """Return the document of ``{"filename", "file_data"}``, whose data are base64 or a data URL."""
    name, data = str(file.get("filename") or ""), file.get("file_data")
    if not isinstance(data, str):
        raise ConfigError(f"an attached file needs file_data; got {', '.join(sorted(file)) or 'nothing'}")
    return attached_document(name or None, data)
