"""Move what an agent's conversation outgrows into memory, word for word, instead of summarising it away.

Before each model call old turns and large tool results leave the messages and are read from memory; the agent's state
and its checkpoints keep them. Needs ``langchain`` (``pip install 'focusllm[langchain-agents]'``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage

from focus_core.session.documents import keeps
from focus_core.session.engines import MemoryHolder
from focus_core.session.long_memory import LongMemory, recall
from focus_core.store.memory import Memory
from focus_core.store.places import find_place
from focus_core.text.corpus import Document
from focus_integrations.langchain.chat_models import ChatFocusLLM
from focus_integrations.langchain.memory import THREAD, memory_tools, thread_of_call, visible_in

Filter = Callable[[Document], bool]


class FocusMemoryMiddleware(AgentMiddleware[Any, Any, Any]):
    """Keeps an agent's conversation short and its memory whole.

    A ``ChatFocusLLM`` reads the memory itself, besides its own memory and documents, whose filter stays in force;
    another model gets what is recalled for the last question in its system message. Turns belong to their thread and
    are seen there only; notes of the tools are seen everywhere. What leaves the messages of a run without a
    ``thread_id`` is read by that run's model calls and kept nowhere.

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
        self._holder = MemoryHolder()

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
        thread = thread_of_call()
        messages, documents = self._split(list(request.messages), thread)
        if thread:
            self.memory.put(documents)
            documents = []
        visible = visible_in(thread)
        memory = self._holder.hold(self.memory.engine, None, self.memory.memory, documents, visible).memory
        if memory is None or not memory.documents:
            return request.override(messages=messages)
        model: Any = request.model
        if isinstance(getattr(model, "bound", model), ChatFocusLLM):
            return request.override(messages=messages, model_settings=self._settings(request, memory, visible))
        question = next((one.text for one in reversed(messages) if isinstance(one, HumanMessage)), "")
        found = recall(self.memory.engine, memory, question, self.k) if question.strip() else []
        if not found:
            return request.override(messages=messages)
        recalled = "\n".join(f"- {item.passage.strip()}" for item in found)
        system = _extended(request.system_message, f"From memory:\n{recalled}")
        return request.override(messages=messages, system_message=system)

    def _settings(self, request: ModelRequest[Any], memory: Memory, visible: Filter) -> dict[str, Any]:
        """Return a call's settings with the thread's memory besides what the model reads without it."""
        given: Any = {**getattr(request.model, "kwargs", {}), **request.model_settings}
        model: Any = getattr(request.model, "bound", request.model)
        brought = given.get("documents")
        several = [] if brought is None else list(brought) if isinstance(brought, (list, tuple)) else [brought]
        settings = {**request.model_settings, "documents": [*several, memory]}
        if self._reads(given.get("memory", model.memory), given.get("memory_path", model.memory_path)):
            wanted = given.get("memory_filter")
            wanted = model.memory_filter if wanted is None else wanted
            settings["memory_filter"] = lambda one: visible(one) and (wanted is None or keeps(wanted, one))
        return settings

    def _reads(self, memory: Any, folder: Any) -> bool:
        """Whether a model's own memory is this one, with all threads in it."""
        folder = folder if memory is None else memory
        if isinstance(folder, Memory) or folder is None or self.memory.folder is None:
            return folder is self.memory.memory
        return find_place(folder).folder.resolve() == self.memory.folder.resolve()

    def _split(self, messages: list[AnyMessage], thread: str) -> tuple[list[AnyMessage], list[Document]]:
        """Return the messages that stay, system messages among them, and the documents that go."""
        count = self.memory.engine.count_tokens
        rules = [message for message in messages if isinstance(message, SystemMessage)]
        messages = [message for message in messages if not isinstance(message, SystemMessage)]
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
        return [*rules, *kept[first:]], moved


def _said(message: AnyMessage) -> str:
    calls = [f"{call['name']}({call['args']})" for call in message.tool_calls] if isinstance(message, AIMessage) else []
    return "\n".join(filter(None, [message.text, *calls]))


def _document(kind: str, message: AnyMessage, text: str, thread: str) -> Document:
    own = message.id or hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    name = "/".join(quote(part, safe="") for part in (kind, thread, own))  # no two threads and ids give one name
    return Document(name, text, {THREAD: thread, "role": message.type})


def _extended(system: SystemMessage | None, text: str) -> SystemMessage:
    if system is None:
        return SystemMessage(text)
    if isinstance(system.content, str):
        return system.model_copy(update={"content": f"{system.content}\n\n{text}"})
    return system.model_copy(update={"content": [*system.content, {"type": "text", "text": text}]})
