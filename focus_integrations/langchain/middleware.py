"""Move what an agent's conversation outgrows into memory, word for word, instead of summarising it away.

Before each model call old turns and large tool results leave the messages and are read from memory; the agent's state
and its checkpoints keep them. Needs ``langchain`` (``pip install 'focusllm[langchain-agents]'``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.config import get_config

from focus_core.session.long_memory import LongMemory
from focus_core.text.corpus import Document
from focus_integrations.langchain.chat_models import ChatFocusLLM
from focus_integrations.langchain.memory import memory_tools

_THREAD = "thread"


class FocusMemoryMiddleware(AgentMiddleware[Any, Any, Any]):
    """Keeps an agent's conversation short and its memory whole.

    A ``ChatFocusLLM`` reads the memory itself; another model gets what is recalled for the last question in its system
    message. Turns belong to their thread and are read there only; notes of the tools are read everywhere.

    Args:
        memory: what is moved goes there.
        keep_tokens: most tokens of messages that stay; everything from the last question on always stays.
        result_tokens: tool results with more tokens are moved.
        tools: give the agent remember, recall and forget.
        k: texts recalled for a model that does not read memory.
    """

    def __init__(
        self, memory: LongMemory, *, keep_tokens: int = 1024, result_tokens: int = 256, tools: bool = True, k: int = 4
    ) -> None:
        super().__init__()
        self.memory, self.keep_tokens, self.result_tokens, self.k = memory, keep_tokens, result_tokens, k
        self.tools = memory_tools(memory) if tools else []

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with what stays, and memory for the rest."""
        return handler(self._moved(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Call the model with what stays, and memory for the rest; the event loop stays free."""
        return await handler(await asyncio.to_thread(self._moved, request))

    def _moved(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        thread = _thread()
        messages, documents = self._split(list(request.messages), thread)
        self.memory.put(documents)

        def visible(document: Document) -> bool:
            return document.metadata.get(_THREAD) in (None, thread)

        if isinstance(request.model, ChatFocusLLM):
            settings = {**request.model_settings, "memory": self.memory.memory, "memory_filter": visible}
            return request.override(messages=messages, model_settings=settings)
        question = next((one.text for one in reversed(messages) if isinstance(one, HumanMessage)), "")
        found = self.memory.recall(question, self.k, visible) if question else []
        if not found:
            return request.override(messages=messages)
        before = f"{request.system_message.text}\n\n" if request.system_message is not None else ""
        recalled = "\n".join(f"- {item.passage.strip()}" for item in found)
        system = SystemMessage(f"{before}From memory:\n{recalled}")
        return request.override(messages=messages, system_message=system)

    def _split(self, messages: list[AnyMessage], thread: str) -> tuple[list[AnyMessage], list[Document]]:
        """Return the messages that stay and the documents that go."""
        count = self.memory.engine.count_tokens
        moved: list[Document] = []
        kept: list[AnyMessage] = []
        for message in messages:
            if isinstance(message, ToolMessage) and count(message.text) > self.result_tokens:
                document = _document("result", message, message.text, thread)
                moved.append(document)
                message = message.model_copy(update={"content": f"(kept in memory as {document.id})"})
            kept.append(message)
        sizes = [count(_said(message)) for message in kept]
        last = max((at for at, message in enumerate(kept) if isinstance(message, HumanMessage)), default=0)
        first = 0
        while first < last and sum(sizes[first:]) > self.keep_tokens:
            first += 1
        while first < last and isinstance(kept[first], ToolMessage):
            first += 1  # a result is never parted from its call
        old = [message for message in kept[:first] if _said(message).strip()]
        moved += [_document("turn", message, f"{message.type}: {_said(message)}", thread) for message in old]
        return kept[first:], moved


def _said(message: AnyMessage) -> str:
    calls = [f"{call['name']}({call['args']})" for call in message.tool_calls] if isinstance(message, AIMessage) else []
    return "\n".join(filter(None, [message.text, *calls]))


def _document(kind: str, message: AnyMessage, text: str, thread: str) -> Document:
    own = message.id or hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Document(
        f"{kind}-{thread}-{own}" if thread else f"{kind}-{own}", text, {_THREAD: thread, "role": message.type}
    )


def _thread() -> str:
    try:
        return str(get_config().get("configurable", {}).get("thread_id") or "")
    except RuntimeError:
        return ""  # outside of a graph
