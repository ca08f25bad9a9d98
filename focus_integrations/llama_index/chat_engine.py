"""Hold a conversation over a whole :class:`FocusMemoryIndex`.

Every turn reads the whole memory; the conversation itself is kept by a LlamaIndex memory, and turns that no longer fit
the window are read as memory too. The chat machinery is LlamaIndex's SimpleChatEngine; sources are added to it. The
other modes are LlamaIndex's own engines, over the nodes that pass the filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ChatResponseAsyncGen, ChatResponseGen
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, ChatMode, StreamingAgentChatResponse
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.utils import LLMType, resolve_llm
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.vector_stores.types import MetadataFilters

from focus_core.errors import ConfigError
from focus_core.session.arguments import keywords, left, refuse_unknown, taken
from focus_integrations.llama_index._found import Found
from focus_integrations.llama_index._selection import ReadNodes, Selection
from focus_integrations.llama_index.llm import FocusLLM
from focus_integrations.llama_index.query_engine import has_objects, query_engine
from focus_integrations.llama_index.retriever import FocusRetriever


class FocusChatEngine(BaseChatEngine):
    """A conversation whose answers read an index's whole memory; usually made by :meth:`from_index`.

    Args:
        index: whose nodes are named as sources.
        reader: model that reads the memory.
        memory: keeps the conversation.
        prefix: turns that stand before every conversation.
    """

    def __init__(
        self, index: ReadNodes, reader: FocusLLM, memory: BaseMemory, prefix: Sequence[ChatMessage] = ()
    ) -> None:
        self.index, self.reader, self.memory, self.prefix = index, reader, memory, list(prefix)
        self.callback_manager = index._callback_manager

    @classmethod
    def from_index(
        cls,
        index: ReadNodes,
        llm: FocusLLM | None = None,
        *,
        chat_history: list[ChatMessage] | None = None,
        memory: BaseMemory | None = None,
        system_prompt: str | None = None,
        prefix_messages: list[ChatMessage] | None = None,
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
            prefix_messages: turns that stand before every conversation, behind the system turn.
            filters: metadata filters that choose the nodes to read.
            doc_ids: documents to read.
            source_top_k: most nodes to name as sources of a turn; ``None`` names all.
            **options: fields of the model to set, such as ``max_tokens``.

        Raises:
            ConfigError: the model has no such field.
        """
        selection = Selection(index, filters, doc_ids)
        reader = (llm or index.llm).with_memory(selection.memory, max_sources=source_top_k, **options)
        kept = memory if memory is not None else _kept(reader, chat_history)
        system = [ChatMessage(role="system", content=system_prompt)] if system_prompt is not None else []
        return cls(index, reader, kept, [*system, *(prefix_messages or [])])

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message."""
        turn = _Turn(self, message)
        response: AgentChatResponse = turn.engine.chat(message, _own(chat_history))
        response.source_nodes, response.metadata = turn.found.nodes, turn.found.metadata
        return response

    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message without blocking the event loop."""
        turn = _Turn(self, message)
        response: AgentChatResponse = await turn.engine.achat(message, _own(chat_history))
        response.source_nodes, response.metadata = turn.found.nodes, turn.found.metadata
        return response

    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Answer piece by piece; sources fill up when the stream has ended."""
        turn = _Turn(self, message)
        response: StreamingAgentChatResponse = turn.engine.stream_chat(message, _own(chat_history))
        response.source_nodes = turn.found.nodes
        return response

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Answer piece by piece without blocking the event loop."""
        turn = _Turn(self, message)
        response: StreamingAgentChatResponse = await turn.engine.astream_chat(message, _own(chat_history))
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
        self.found = Found(message, owner.index.node, owner.index.metadata_mode)
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


class CondensingChatEngine(CondenseQuestionChatEngine):
    """LlamaIndex's engine over two query engines of which one streams.

    LlamaIndex makes its own query engines stream for a moment by switching a flag that they share between calls; others
    do not stream at all.
    """

    _streamed: CondenseQuestionChatEngine

    def streaming(self, query_engine: BaseQueryEngine) -> Self:
        """Set the engine that streams; returns itself."""
        self._streamed = CondenseQuestionChatEngine(
            query_engine, self._condense_question_prompt, self._memory, self._llm, self._verbose, self.callback_manager
        )
        return self

    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Answer piece by piece; sources fill up when the stream has ended."""
        return _with_sources(self._streamed.stream_chat(message, chat_history))

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Answer piece by piece without blocking the event loop."""
        return _with_sources(await self._streamed.astream_chat(message, chat_history))


def _with_sources(response: StreamingAgentChatResponse) -> StreamingAgentChatResponse:
    response.source_nodes = response.sources[0].raw_output.source_nodes  # the list itself: it is yet to be filled
    return response


_ENGINES: dict[ChatMode, Any] = {
    ChatMode.BEST: CondensePlusContextChatEngine,
    ChatMode.CONDENSE_PLUS_CONTEXT: CondensePlusContextChatEngine,
    ChatMode.CONTEXT: ContextChatEngine,
    ChatMode.CONDENSE_QUESTION: CondensingChatEngine,
    ChatMode.SIMPLE: SimpleChatEngine,
}
_RETRIEVER = keywords(FocusRetriever.__init__, "index", "llm", "callback_manager")
_OWN = keywords(FocusChatEngine.from_index, "cls", "index", "llm")
_IDLE = frozenset({"verbose", "streaming", "use_async"})  # a chat engine streams where it is asked to


def chat_engine(index: ReadNodes, mode: ChatMode, llm: LLMType | None, values: dict[str, Any]) -> BaseChatEngine:
    """Return the chat engine that these arguments ask for.

    Args:
        index: what to read.
        mode: ``best`` and ``context`` give a :class:`FocusChatEngine` if the model is a ``FocusLLM`` and no argument
            asks for chosen nodes; all others give LlamaIndex's engines.
        llm: the index's if not given.
        values: arguments of the engine, of :class:`FocusRetriever`, and fields of a ``FocusLLM``.

    Raises:
        ConfigError: an argument is unknown, or LlamaIndex has no such chat engine any more.
    """
    if mode not in _ENGINES:
        raise ConfigError(f"there is no chat engine for mode {mode!r}; use an agent with index_tool instead")
    talker = resolve_llm(llm, callback_manager=index._callback_manager) if llm is not None else index.llm
    fields = frozenset(FocusLLM.model_fields) if isinstance(talker, FocusLLM) else frozenset()
    whole = isinstance(talker, FocusLLM) and mode in (ChatMode.BEST, ChatMode.CONTEXT) and not has_objects(index)
    if isinstance(talker, FocusLLM) and whole and values.keys() <= _OWN | fields | _IDLE:
        return FocusChatEngine.from_index(index, talker, **left(values, _IDLE))
    own = keywords(_ENGINES[mode].from_defaults, "cls", "retriever", "query_engine", "llm")
    chat, rest = taken(values, own), left(values, own)
    if isinstance(talker, FocusLLM):
        if chat.get("memory") is None:
            chat["memory"] = _kept(talker, chat.get("chat_history"))
        talker = talker.with_fields(**taken(rest, fields - _RETRIEVER - {"callback_manager", "template"}))
    if mode == ChatMode.CONDENSE_QUESTION:
        asked = left(rest, {"streaming"})
        plain, streamed = (query_engine(index, talker, {**asked, "streaming": flag}) for flag in (False, True))
        condensing = cast(CondensingChatEngine, CondensingChatEngine.from_defaults(plain, llm=talker, **chat))
        return condensing.streaming(streamed)
    refuse_unknown(rest, _RETRIEVER | fields | own | _IDLE)
    if mode != ChatMode.SIMPLE:
        chat["retriever"] = FocusRetriever(index, **taken(rest, _RETRIEVER))
    return cast(BaseChatEngine, _ENGINES[mode].from_defaults(llm=talker, **chat))


def _kept(reader: FocusLLM, chat_history: list[ChatMessage] | None) -> BaseMemory:
    """Return a memory that forgets nothing which the model can read."""
    return ChatMemoryBuffer.from_defaults(
        chat_history=_own(chat_history),
        token_limit=reader.metadata.context_window,
        tokenizer_fn=reader.engine.tokenizer.encode,
    )


def _own(turns: list[ChatMessage] | None) -> list[ChatMessage] | None:
    """Return a list that the caller does not hold: LlamaIndex's memories append to the one that they are given."""
    return None if turns is None else list(turns)
