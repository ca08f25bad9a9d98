"""Use FocusLLM as a model, splitter, retriever and memory in LangChain."""

from focus_integrations.langchain.chat_models import ChatFocusLLM
from focus_integrations.langchain.llm import FocusLLM

__all__ = ["ChatFocusLLM", "FocusLLM"]
