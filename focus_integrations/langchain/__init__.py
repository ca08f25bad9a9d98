"""Use FocusLLM as a model, splitter, retriever and memory in LangChain.

What needs more than langchain-core is imported from its module: ``middleware.FocusMemoryMiddleware`` and
``store.FocusMemoryStore``.
"""

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
