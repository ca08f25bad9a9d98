"""Cut texts into pieces that become exactly one memory chunk each, with exact offsets.

Boundaries come from :mod:`focus_core.text.chunking`: paragraphs, then sentences, then tokens. A piece is
``text[start_index:end_index]``, in repetitive text too, and the pieces of a text tile it. No weights are loaded: the
tokenizer is enough.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property
from typing import Any

from langchain_core.documents import Document
from langchain_text_splitters import TextSplitter
from transformers import PreTrainedTokenizerBase

from focus_core.config import FocusConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.model.hub import load_tokenizer
from focus_core.text.chunking import Chunk, cut
from focus_core.text.tokenization import TextTokenizer


class FocusTextSplitter(TextSplitter):
    """Cut texts to the chunks a model reads.

    Example:
        >>> from focus_integrations.langchain import FocusTextSplitter
        >>> FocusTextSplitter(chunk_size=256).split_documents(documents)  # doctest: +SKIP

    Args:
        chunk_size: most tokens of a piece; the engine's, or 512.
        model: base whose tokenizer counts: hub name, folder or GGUF file; the installed default if not given.
        tokenizer: a transformers tokenizer, instead of the model's.
        engine: a loaded engine, instead of both; pieces then never exceed what its window leaves for a chunk.

    Raises:
        ConfigError: the chunk size is below 1 or more than the engine's window has room for.
        BaseModelError: the tokenizer cannot be found.
    """

    def __init__(
        self,
        chunk_size: int | None = None,
        *,
        model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        engine: FocusEngine | None = None,
    ) -> None:
        config = engine.config if engine is not None else FocusConfig()
        size = config.chunk_size if chunk_size is None else chunk_size
        if size < 1 or (engine is not None and size > config.largest_chunk):
            bound = f"between 1 and {config.largest_chunk}" if engine is not None else "at least 1"
            raise ConfigError(f"chunk_size must be {bound}; got {size}")
        super().__init__(chunk_size=size, chunk_overlap=0, length_function=self._count, add_start_index=True)
        self._model, self._given = model, engine.tokenizer.tokenizer if engine is not None else tokenizer

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self._given if self._given is not None else load_tokenizer(self._model))

    def split_text(self, text: str) -> list[str]:
        """Return the pieces of a text; joined they are the text."""
        return [text[chunk.start : chunk.end] for chunk in self._cut(text)]

    def create_documents(self, texts: list[str], metadatas: list[dict[Any, Any]] | None = None) -> list[Document]:
        """Return the pieces of several texts with their metadata.

        ``start_index``, ``end_index`` (characters), ``n_tokens`` and ``chunk_hash`` (of the tokens) are added.
        """
        found = []
        for text, metadata in zip(texts, metadatas or [{}] * len(texts), strict=True):
            for chunk in self._cut(text):
                facts = {
                    "start_index": chunk.start,
                    "end_index": chunk.end,
                    "n_tokens": len(chunk.ids),
                    "chunk_hash": hashlib.sha256(repr(chunk.ids).encode()).hexdigest()[:16],
                }
                content = text[chunk.start : chunk.end]
                found.append(Document(page_content=content, metadata={**copy.deepcopy(metadata), **facts}))
        return found

    def _cut(self, text: str) -> list[Chunk]:
        chunks = cut("", text, self._tokenizer.encode_with_offsets(text), self._chunk_size)
        return chunks if text.strip() else []

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))
