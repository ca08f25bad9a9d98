"""Use FocusLLM in LlamaIndex: a model, and an index whose every document can influence every answer."""

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
