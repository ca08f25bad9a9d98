"""Use FocusLLM in LlamaIndex: a model, and an index whose every document can influence every answer."""

from focus_integrations.llama_index.llm import FocusLLM
from focus_integrations.llama_index.node_parser import FocusNodeParser

__all__ = ["FocusLLM", "FocusNodeParser"]
