"""Use FocusLLM as a model, splitter, retriever and memory in LangChain.

What needs more than langchain-core is imported from its module: ``middleware.FocusMemoryMiddleware`` and
``store.FocusMemoryStore``.
"""

from typing import TYPE_CHECKING

from focus_core.lazy import lazily

if TYPE_CHECKING:
    from focus_core.session.long_memory import LongMemory
    from focus_integrations.langchain.chat_models import ChatFocusLLM
    from focus_integrations.langchain.llm import FocusLLM
    from focus_integrations.langchain.memory import (
        FocusDocumentStore,
        ForgetTool,
        RecallTool,
        RememberTool,
        memory_tools,
    )
    from focus_integrations.langchain.retrievers import FocusRetriever, create_documents_chain
    from focus_integrations.langchain.text_splitter import FocusTextSplitter

__all__ = [
    "ChatFocusLLM",
    "FocusDocumentStore",
    "FocusLLM",
    "FocusRetriever",
    "FocusTextSplitter",
    "ForgetTool",
    "LongMemory",
    "RecallTool",
    "RememberTool",
    "create_documents_chain",
    "memory_tools",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ChatFocusLLM": "focus_integrations.langchain.chat_models",
        "FocusDocumentStore": "focus_integrations.langchain.memory",
        "FocusLLM": "focus_integrations.langchain.llm",
        "FocusRetriever": "focus_integrations.langchain.retrievers",
        "FocusTextSplitter": "focus_integrations.langchain.text_splitter",
        "ForgetTool": "focus_integrations.langchain.memory",
        "LongMemory": "focus_core.session.long_memory",
        "RecallTool": "focus_integrations.langchain.memory",
        "RememberTool": "focus_integrations.langchain.memory",
        "create_documents_chain": "focus_integrations.langchain.retrievers",
        "memory_tools": "focus_integrations.langchain.memory",
    },
)
