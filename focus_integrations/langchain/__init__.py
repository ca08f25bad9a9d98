"""Use FocusLLM as an LLM in LangChain chains."""

from focus_integrations.langchain.llm import FocusLLM

__all__ = ["FocusLLM"]
