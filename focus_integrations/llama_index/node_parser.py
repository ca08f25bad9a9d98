"""Cut LlamaIndex documents into nodes that become exactly one memory chunk each.

Boundaries come from :mod:`focus_core.text.chunking`; a node with its metadata header has no more tokens than a chunk.
Node ids depend on document, position and text alone, and ``document.text[start:end]`` is the node's text, in repetitive
text too. No weights are loaded: the tokenizer is enough.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self, TypeVar

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.node_parser.interface import IdFuncCallable, MetadataAwareTextSplitter
from llama_index.core.node_parser.node_utils import build_nodes_from_splits
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode
from llama_index.core.utils import get_tqdm_iterable
from transformers import PreTrainedTokenizerBase

from focus_core.errors import ConfigError
from focus_core.model.hub import load_tokenizer
from focus_core.text.chunking import Chunk, cut
from focus_core.text.corpus import read_well_formed, well_formed
from focus_core.text.tokenization import TextTokenizer

_NAMESPACE = uuid.UUID("6f0c5ad1-4f4e-5d9b-9d0e-24081174500f")
N = TypeVar("N", bound=BaseNode)
_LEAST_TEXT = 8  # tokens of a chunk that must be left for text beside the metadata


def focus_node_id(i: int, doc: BaseNode) -> str:
    """Name node ``i`` of a document: the default ``id_func``; :class:`FocusNodeParser` adds the text to the name."""
    return _node_id(doc, i, "")


class FocusNodeParser(MetadataAwareTextSplitter):
    """Cut documents at paragraphs and sentences into nodes of at most ``chunk_size`` tokens, metadata included.

    Everything that changes its output is a field, so an ingestion pipeline's cache can be trusted. It pickles.

    Example:
        >>> from focus_integrations.llama_index import FocusNodeParser
        >>> FocusNodeParser(chunk_size=256).get_nodes_from_documents(documents)  # doctest: +SKIP

    Raises:
        ConfigError: a document's metadata leave no room for text in a chunk.
        BaseModelError: the tokenizer cannot be found.
    """

    model: str | None = Field(
        default=None, description="Base whose tokenizer counts: hub name, folder or GGUF file; the default if None."
    )
    chunk_size: int = Field(default=512, gt=_LEAST_TEXT, description="Most tokens of a node with its metadata.")
    tokenizer_hash: str = Field(default="", description="Hash of the tokenizer; filled in.")
    id_func: IdFuncCallable = Field(default=focus_node_id, description="Names nodes; deterministic by default.")

    _given: PreTrainedTokenizerBase | None = PrivateAttr(default=None)

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, **values: Any) -> None:
        if not callable(values.get("id_func")):  # absent, or the name that to_dict wrote
            values["id_func"] = focus_node_id
        super().__init__(**values)
        self._given = tokenizer
        self.tokenizer_hash = self._tokenizer_hash()

    @classmethod
    def class_name(cls) -> str:
        """Name used in serialised settings."""
        return "FocusNodeParser"

    @classmethod
    def from_defaults(
        cls,
        llm: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chunk_size: int | None = None,
        include_metadata: bool = True,
        include_prev_next_rel: bool = True,
        **values: Any,
    ) -> Self:
        """Take tokenizer and chunk size from a model.

        Args:
            llm: a ``FocusLLM``; its engine is loaded for the adapter's chunk size unless ``chunk_size`` is given.
            tokenizer: a transformers tokenizer, instead of the model's.
            chunk_size: most tokens of a node with its metadata.
            include_metadata: count metadata, and copy it to the nodes.
            include_prev_next_rel: link neighbouring nodes.
            **values: other fields.
        """
        if llm is not None:
            values.setdefault("model", llm.model)
            tokenizer = tokenizer or llm.engine.loaded.tokenizer
            chunk_size = chunk_size or llm.engine.config.chunk_size
        if chunk_size is not None:
            values["chunk_size"] = chunk_size
        return cls(tokenizer, include_metadata=include_metadata, include_prev_next_rel=include_prev_next_rel, **values)

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self._given if self._given is not None else load_tokenizer(self.model))

    def _tokenizer_hash(self) -> str:
        backend = self._tokenizer.tokenizer.backend_tokenizer
        return hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {"fields": fields, "tokenizer": self._given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"], **state["fields"])  # type: ignore[misc]

    # -- splitting ----------------------------------------------------------------------------------------------

    def split_text(self, text: str) -> list[str]:
        """Cut text without metadata."""
        return self.split_text_metadata_aware(text, "")

    def split_text_metadata_aware(self, text: str, metadata_str: str) -> list[str]:
        """Cut text so that each piece, behind ``metadata_str``, fits a chunk."""
        node = TextNode(text="")
        return [text[chunk.start : chunk.end] for chunk in self._cut(text, metadata_str, node)]

    def _parse_nodes(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> list[BaseNode]:
        found: list[BaseNode] = []
        for node in get_tqdm_iterable(list(map(hashable, nodes)), show_progress, "Parsing nodes"):
            text = node.get_content(metadata_mode=MetadataMode.NONE)
            header = self._get_metadata_str(node) if self.include_metadata else ""
            chunks = self._cut(text, header, node)
            pieces = [text[chunk.start : chunk.end] for chunk in chunks]
            offset = (getattr(node, "start_char_idx", None) or 0) if node.source_node is not None else 0
            made = build_nodes_from_splits(pieces, node, id_func=self._namer(pieces))
            for chunk, piece in zip(chunks, made, strict=True):
                piece.start_char_idx, piece.end_char_idx = offset + chunk.start, offset + chunk.end
            found.extend(made)
        return found

    def _postprocess_parsed_nodes(self, nodes: list[BaseNode], parent_doc_map: dict[str, Document]) -> list[BaseNode]:
        spans = [(node.start_char_idx, node.end_char_idx) for node in nodes if isinstance(node, TextNode)]
        done = super()._postprocess_parsed_nodes(nodes, parent_doc_map)  # looks offsets up by text; ours are exact
        for node, (start, end) in zip(done, spans, strict=True):
            assert isinstance(node, TextNode)
            node.start_char_idx, node.end_char_idx = start, end
        return done

    def _namer(self, pieces: list[str]) -> Any:
        if self.id_func is not focus_node_id:
            return self.id_func
        return lambda i, doc: _node_id(doc, i, pieces[i])

    def _cut(self, text: str, header: str, node: BaseNode) -> list[Chunk]:
        """Cut ``text`` to the largest budget at which every piece behind ``header`` has at most a chunk's tokens."""
        if not text.strip():
            return []
        encoded = self._tokenizer.encode_with_offsets(text)
        budget = self.chunk_size - (len(self._tokenizer.encode(f"{header}\n\n")) if header else 0)
        while budget >= _LEAST_TEXT:
            chunks = cut("", text, encoded, budget)
            over = max(self._count(text[chunk.start : chunk.end], header, node) for chunk in chunks) - self.chunk_size
            if over <= 0:
                return chunks
            budget -= over  # cut apart, a text may have a few tokens more than inside its document
        raise ConfigError(
            f"the metadata of {node.node_id!r} leave {max(budget, 0)} of {self.chunk_size} tokens for text; exclude "
            "keys with excluded_llm_metadata_keys and excluded_embed_metadata_keys, set include_metadata=False, or "
            "use a larger chunk_size"
        )

    def _count(self, piece: str, header: str, node: BaseNode) -> int:
        if header:
            template: str = getattr(node, "text_template", "{metadata_str}\n\n{content}")
            piece = template.format(content=piece, metadata_str=header).strip()
        return len(self._tokenizer.encode(piece))


def hashable(node: N) -> N:
    """Return a node whose text LlamaIndex can hash: half a surrogate pair is read as U+FFFD, with a warning."""
    text = node.get_content(metadata_mode=MetadataMode.NONE) if isinstance(node, (Document, TextNode)) else ""
    whole = read_well_formed(text, f"the text of {node.node_id!r}")
    if whole == text:
        return node
    copied = node.model_copy(deep=True)
    copied.set_content(whole)
    return copied


def _node_id(document: BaseNode, index: int, text: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{well_formed(document.node_id)}\0{index}\0{well_formed(text)}"))
