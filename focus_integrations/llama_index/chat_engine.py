"""Hold a conversation over a whole :class:`FocusMemoryIndex`.

Every turn reads the whole memory; the conversation itself is kept by a LlamaIndex memory, and turns that no longer fit
the window are read as memory too. The chat machinery is LlamaIndex's SimpleChatEngine; sources are added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ChatResponseAsyncGen, ChatResponseGen
from llama_index.core.chat_engine.simple import SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.vector_stores.types import MetadataFilters

from focus_integrations.llama_index._found import Found
from focus_integrations.llama_index._selection import Selection
from focus_integrations.llama_index.llm import FocusLLM

if TYPE_CHECKING:
    from focus_integrations.llama_index.index import FocusMemoryIndex


class FocusChatEngine(BaseChatEngine):
    """A conversation whose answers read an index's whole memory; usually made by :meth:`from_index`.

    Args:
        index: whose nodes are named as sources.
        reader: model that reads the memory.
        memory: keeps the conversation.
        prefix: turns that stand before every conversation.
    """

    def __init__(
        self, index: FocusMemoryIndex, reader: FocusLLM, memory: BaseMemory, prefix: Sequence[ChatMessage] = ()
    ) -> None:
        self.index, self.reader, self.memory, self.prefix = index, reader, memory, list(prefix)
        self.callback_manager = index._callback_manager

    @classmethod
    def from_index(
        cls,
        index: FocusMemoryIndex,
        llm: FocusLLM | None = None,
        *,
        chat_history: list[ChatMessage] | None = None,
        memory: BaseMemory | None = None,
        system_prompt: str | None = None,
        filters: MetadataFilters | None = None,
        doc_ids: Sequence[str] | None = None,
        source_top_k: int | None = 10,
        **options: Any,
    ) -> Self:
        """Begin a conversation.

        Args:
            index: what every turn reads.
            llm: model to answer with; the index's if not given.
            chat_history: turns to begin with.
            memory: LlamaIndex memory that keeps the conversation; one that forgets nothing if not given.
            system_prompt: system turn.
            filters: metadata filters that choose the nodes to read.
            doc_ids: documents to read.
            source_top_k: most nodes to name as sources of a turn; ``None`` names all.
            **options: fields of the model to set, such as ``max_tokens``.
        """
        selection = Selection(index, filters, doc_ids)
        reader = (llm or index.llm).with_memory(selection.memory, max_sources=source_top_k, **options)
        kept = memory or ChatMemoryBuffer.from_defaults(
            chat_history=chat_history,
            token_limit=reader.metadata.context_window,
            tokenizer_fn=reader.engine.tokenizer.encode,
        )
        prefix = [ChatMessage(role="system", content=system_prompt)] if system_prompt is not None else []
        return cls(index, reader, kept, prefix)

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message."""
        turn = _Turn(self, message)
        response: AgentChatResponse = turn.engine.chat(message, chat_history)
        response.source_nodes, response.metadata = turn.found.nodes, turn.found.metadata
        return response

    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message without blocking the event loop."""
        turn = _Turn(self, message)
        response: AgentChatResponse = await turn.engine.achat(message, chat_history)
        response.source_nodes, response.metadata = turn.found.nodes, turn.found.metadata
        return response

    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Answer piece by piece; sources fill up when the stream has ended."""
        turn = _Turn(self, message)
        response: StreamingAgentChatResponse = turn.engine.stream_chat(message, chat_history)
        response.source_nodes = turn.found.nodes
        return response

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Answer piece by piece without blocking the event loop."""
        turn = _Turn(self, message)
        response: StreamingAgentChatResponse = await turn.engine.astream_chat(message, chat_history)
        response.source_nodes = turn.found.nodes
        return response

    def reset(self) -> None:
        """Forget the conversation; the index keeps its memory."""
        self.memory.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        """Turns so far."""
        return self.memory.get_all()


class _Turn:
    """One turn: stands between LlamaIndex's chat machinery and the model, and notes the sources that pass."""

    def __init__(self, owner: FocusChatEngine, message: str) -> None:
        self.owner = owner
        self.found = Found(message, owner.index.node)
        self.engine = SimpleChatEngine(cast(LLM, self), owner.memory, owner.prefix, owner.callback_manager)

    def chat(self, messages: Sequence[ChatMessage]) -> ChatResponse:
        return self._note(self.owner.reader.chat(messages))

    async def achat(self, messages: Sequence[ChatMessage]) -> ChatResponse:
        return self._note(await self.owner.reader.achat(messages))

    def stream_chat(self, messages: Sequence[ChatMessage]) -> ChatResponseGen:
        for part in self.owner.reader.stream_chat(messages):
            yield self._note(part)

    async def astream_chat(self, messages: Sequence[ChatMessage]) -> ChatResponseAsyncGen:
        async def parts() -> ChatResponseAsyncGen:
            async for part in await self.owner.reader.astream_chat(messages):
                yield self._note(part)

        return parts()

    def _note(self, response: ChatResponse) -> ChatResponse:
        self.found.begin()
        if response.raw is not None:
            self.found.finish(response.raw)
        return response
