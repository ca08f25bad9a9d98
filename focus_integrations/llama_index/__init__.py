"""Use FocusLLM as an LLM in LlamaIndex query engines."""

from focus_integrations.llama_index.llm import FocusLLM

__all__ = ["FocusLLM"]
