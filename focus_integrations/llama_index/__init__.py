"""Use FocusLLM in LlamaIndex: a model, and an index whose every document can influence every answer."""

from typing import TYPE_CHECKING

from focus_core.lazy import lazily

if TYPE_CHECKING:
    from focus_integrations.llama_index.chat_engine import FocusChatEngine
    from focus_integrations.llama_index.events import FocusAttributionEvent, FocusPrefillEvent
    from focus_integrations.llama_index.index import FocusMemoryIndex
    from focus_integrations.llama_index.llm import FocusLLM
    from focus_integrations.llama_index.memory import FocusMemoryBlock
    from focus_integrations.llama_index.node_parser import FocusNodeParser
    from focus_integrations.llama_index.prefill import FocusPrefill
    from focus_integrations.llama_index.query_engine import FocusQueryEngine
    from focus_integrations.llama_index.retriever import FocusRetriever
    from focus_integrations.llama_index.synthesizer import FocusSynthesizer
    from focus_integrations.llama_index.tools import index_tool, memory_tools

__all__ = [
    "FocusAttributionEvent",
    "FocusChatEngine",
    "FocusLLM",
    "FocusMemoryBlock",
    "FocusMemoryIndex",
    "FocusNodeParser",
    "FocusPrefill",
    "FocusPrefillEvent",
    "FocusQueryEngine",
    "FocusRetriever",
    "FocusSynthesizer",
    "index_tool",
    "memory_tools",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "FocusAttributionEvent": "focus_integrations.llama_index.events",
        "FocusChatEngine": "focus_integrations.llama_index.chat_engine",
        "FocusLLM": "focus_integrations.llama_index.llm",
        "FocusMemoryBlock": "focus_integrations.llama_index.memory",
        "FocusMemoryIndex": "focus_integrations.llama_index.index",
        "FocusNodeParser": "focus_integrations.llama_index.node_parser",
        "FocusPrefill": "focus_integrations.llama_index.prefill",
        "FocusPrefillEvent": "focus_integrations.llama_index.events",
        "FocusQueryEngine": "focus_integrations.llama_index.query_engine",
        "FocusRetriever": "focus_integrations.llama_index.retriever",
        "FocusSynthesizer": "focus_integrations.llama_index.synthesizer",
        "index_tool": "focus_integrations.llama_index.tools",
        "memory_tools": "focus_integrations.llama_index.tools",
    },
)
