"""Read a whole corpus with a small language model: FocusLLM (arXiv 2408.11745) as a library."""

from focus_core.attribution import Evidence
from focus_core.config import DecodeConfig, FocusConfig, TrainConfig
from focus_core.corpus import Document, load_documents, read_documents
from focus_core.engine import Answer, AnswerStream, FocusEngine
from focus_core.errors import FocusError
from focus_core.memory import Memory

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
