"""Read a whole corpus with a small language model: FocusLLM (arXiv 2408.11745) as a library."""

from focus_core.answers import Answer, AnswerStream
from focus_core.config import DecodeConfig, FocusConfig, TrainConfig
from focus_core.engine import FocusEngine
from focus_core.errors import FocusError
from focus_core.method.attribution import Evidence
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document, load_documents, read_documents

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerStream",
    "DecodeConfig",
    "Document",
    "Evidence",
    "FocusConfig",
    "FocusEngine",
    "FocusError",
    "Memory",
    "TrainConfig",
    "load_documents",
    "read_documents",
]
