"""Read a whole corpus with a small language model: FocusLLM (arXiv 2408.11745) as a library."""

from typing import TYPE_CHECKING

from focus_core.lazy import lazily

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Answer": "focus_core.answers",
        "AnswerStream": "focus_core.answers",
        "DecodeConfig": "focus_core.config",
        "Document": "focus_core.text.corpus",
        "Evidence": "focus_core.method.attribution",
        "FocusConfig": "focus_core.config",
        "FocusEngine": "focus_core.engine",
        "FocusError": "focus_core.errors",
        "Memory": "focus_core.store.memory",
        "TrainConfig": "focus_core.config",
        "load_documents": "focus_core.text.corpus",
        "read_documents": "focus_core.text.corpus",
    },
)
