"""Turn LlamaIndex chat messages into core messages, and the engine's output back into LlamaIndex responses.

Text is read; citable content and documents become documents for memory instead of prompt text; what cannot be read is
refused by name. Nothing is generated here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    DocumentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from focus_core.answers import Answer
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError, FocusError
from focus_core.model.chat import Message, Role
from focus_core.model.tool_calls import ToolCall
from focus_core.session.attachments import attached_document
from focus_core.session.citations import cite
from focus_core.session.documents import source_dicts, written
from focus_core.session.request import Call
from focus_core.text.corpus import Document, canonical

logger = logging.getLogger(__name__)

CITATIONS = 5
"""Most citations of an answer."""

_ROLES: dict[MessageRole, Role] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


# -- in ---------------------------------------------------------------------------------------------------------


def to_messages(messages: Sequence[ChatMessage], skip: bool = False) -> tuple[list[Message], list[Document]]:
    """Return a conversation and the documents that its blocks carry; blank ones are left out and logged.

    Args:
        messages: oldest first.
        skip: leave out what is no text, and log it, instead of raising.

    Raises:
        ConfigError: a block is no text (image, audio, video).
        NotTextError: a document block holds no text.
    """
    found: list[Message] = []
    documents: list[Document] = []
    for message in messages:
        texts: list[str] = []
        calls: list[ToolCall] = []
        for block in message.blocks:
            try:
                if isinstance(block, TextBlock):
                    texts.append(block.text)
                elif isinstance(block, ToolCallBlock):
                    calls.append(ToolCall(block.tool_call_id or "", block.tool_name, _arguments(block.tool_kwargs)))
                elif isinstance(block, (CitableBlock, DocumentBlock)):
                    documents += _written([_document(block)])
                elif not isinstance(block, (ThinkingBlock, CitationBlock, CachePoint)):
                    raise ConfigError(
                        f"FocusLLM reads text; a message of role {message.role.value!r} holds a {type(block).__name__}"
                    )
            except (FocusError, OSError, ValueError) as error:  # of a file or address as well
                if not skip:
                    raise
                logger.warning("a part of a message is skipped: %s", error)
        extra = message.additional_kwargs
        calls = calls or [_call_of(item) for item in extra.get("tool_calls") or ()]
        found.append(
            Message(
                _ROLES[message.role],
                "\n".join(texts),
                tuple(calls),
                extra.get("tool_call_id"),
                extra.get("name"),
            )
        )
    return found, documents


def _arguments(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """Return the arguments of a call in the history; what is no JSON object is kept as it stands."""
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    return value if isinstance(value, dict) else {"value": value}


def _call_of(item: Any) -> ToolCall:
    """Return a call in the form of OpenAI's API, as older histories and some models' integrations keep it."""
    call = item if isinstance(item, dict) else item.model_dump()
    function = call.get("function") or call
    return ToolCall(str(call.get("id") or ""), function["name"], _arguments(function.get("arguments") or {}))


def _written(documents: list[Document]) -> list[Document]:
    for document in documents:
        if not document.text.strip():
            logger.warning("the attachment %r holds no text and is left out", document.id)
    return written(documents)


def _document(block: CitableBlock | DocumentBlock) -> Document:
    if isinstance(block, CitableBlock):
        texts = []
        for part in block.content:
            if isinstance(part, TextBlock):
                texts.append(part.text)
            elif isinstance(part, DocumentBlock):
                texts.append(_document(part).text)
            else:
                raise ConfigError(f"FocusLLM reads text; the citable {block.title!r} holds a {type(part).__name__}")
        name = block.source or block.title
        return Document(name, "\n\n".join(texts), {"title": block.title, "source": name})
    name = str(block.path or block.url or block.title or "document")
    data = block.resolve_document().read()
    found = attached_document(name, data, block.document_mimetype)
    return replace(found, metadata={**found.metadata, "title": block.title or name, "source": name})


# -- out --------------------------------------------------------------------------------------------------------


def blocks_of(text: str, calls: Sequence[ToolCall], citations: Sequence[CitationBlock] = ()) -> list[ContentBlock]:
    """Return the blocks of an assistant's message."""
    found: list[ContentBlock] = [TextBlock(text=text)] if text or not calls else []
    found += [ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls]
    return [*found, *citations]


def message_of(blocks: list[ContentBlock]) -> ChatMessage:
    """Return an assistant's message."""
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks)


def citations_of(call: Call, carried: Sequence[Document]) -> list[CitationBlock]:
    """Return the best passages of the documents that a request's blocks carried, with their exact places.

    A carried document may be held under another id than its own, which another document of the memory has.
    """
    known = {(document.text, canonical(document.metadata)) for document in carried}
    held = {key: one for key, one in call.stream.documents.items() if (one.text, canonical(one.metadata)) in known}
    own = ("page", "source_start", "source_end", "start", "end")  # LlamaIndex keeps whole numbers alone
    return [
        CitationBlock(
            cited_content=TextBlock(text=citation.cited_text),
            source=citation.url or citation.title,
            title=citation.title,
            additional_location_info={name: at for name in own if (at := getattr(citation, name)) is not None},
        )
        for citation in (cite(call.stream.answer, held, CITATIONS) if held and not call.calls else ())
    ]


def usage_of(answer: Answer) -> dict[str, int]:
    """Return token counts under the names that LlamaIndex reads; the memory's tokens are part of the prompt."""
    prompt = answer.usage.local + answer.usage.memory
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.usage.generated,
        "total_tokens": prompt + answer.usage.generated,
    }


def about(call: Call, max_sources: int | None) -> dict[str, Any]:
    """Return what a response says of its answer besides the text: ``raw``, ``logprobs`` and token counts.

    Args:
        call: that has ended.
        max_sources: documents to name, best first; ``None`` names all.
    """
    answer = call.stream.answer
    usage = usage_of(answer)
    raw = {
        "usage": {**usage, "prompt_tokens_details": {"cached_tokens": answer.usage.memory - call.computed}},
        "finish_reason": answer.finish_reason,
        "focus": {
            "supported": answer.supported,
            "chunks": answer.usage.chunks,
            "memory_tokens": answer.usage.memory,
            "local_tokens": answer.usage.local,
            "read_now": call.held.created,
            "sources": source_dicts(answer)[:max_sources],
            "citations": [citation.to_dict() for citation in call.citations(CITATIONS)],
        },
    }
    return {"raw": raw, "logprobs": logprobs_of(answer, call.engine), "additional_kwargs": usage}


def logprobs_of(answer: Answer, engine: FocusEngine) -> list[list[LogProb]] | None:
    """Return, per token, the chosen one and its alternatives; ``None`` where none were asked for."""
    if not any(token.top for token in answer.tokens):
        return None
    decode = engine.tokenizer.decode
    return [
        [
            LogProb(token=decode([token.id]), logprob=token.logprob),
            *(LogProb(token=decode([other]), logprob=value) for other, value in token.top if other != token.id),
        ]
        for token in answer.tokens
    ]
