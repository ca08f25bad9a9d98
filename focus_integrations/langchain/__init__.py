"""Use FocusLLM as a model, splitter, retriever and memory in LangChain."""

from focus_integrations.langchain.chat_models import ChatFocusLLM
from focus_integrations.langchain.llm import FocusLLM
from focus_integrations.langchain.retrievers import FocusRetriever, create_documents_chain
from focus_integrations.langchain.text_splitter import FocusTextSplitter

__all__ = ["ChatFocusLLM", "FocusLLM", "FocusRetriever", "FocusTextSplitter", "create_documents_chain"]
