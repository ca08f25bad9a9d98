"""Turn LlamaIndex nodes into core documents, and an answer's sources back into nodes with scores.

One node is one core document under the node's id, so that a node is added, removed and scored on its own. Nothing is
computed here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from llama_index.core.schema import DEFAULT_TEXT_NODE_TMPL, BaseNode, MetadataMode, NodeWithScore
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from focus_core.text.corpus import Document

logger = logging.getLogger(__name__)


def to_documents(nodes: Iterable[BaseNode], mode: MetadataMode) -> list[Document]:
    """Return one document a node; nodes without text (empty, images only) are left out and logged.

    Args:
        nodes: any nodes.
        mode: which metadata stands in front of the text, as in ``node.get_content``.
    """
    found, empty = [], []
    for node in nodes:
        if node.get_content(MetadataMode.NONE).strip():
            found.append(Document(node.node_id, node.get_content(mode), {"ref_doc_id": node.ref_doc_id}))
        else:
            empty.append(node.node_id)
    if empty:
        logger.warning("%d nodes hold no text and are left out of memory, the first one is %s", len(empty), empty[0])
    return found


def scored_nodes(
    sources: Iterable[Mapping[str, Any]], node_of: Callable[[str], BaseNode | None], limit: int | None = None
) -> list[NodeWithScore]:
    """Return the nodes of an answer's sources, best first.

    Args:
        sources: with ``document_id`` and ``score``, best first.
        node_of: finds a node by its id; ``None`` where it is not known (a long prompt's head, a call's own documents).
        limit: most nodes to return; ``None`` returns all.
    """
    found = []
    for source in sources:
        node = node_of(str(source["document_id"]))
        if node is not None:
            found.append(NodeWithScore(node=node, score=float(source["score"])))
    return found[:limit]


def matching(
    nodes: Sequence[BaseNode], filters: MetadataFilters | None, doc_ids: Sequence[str] | None
) -> list[BaseNode]:
    """Return the nodes that pass LlamaIndex metadata filters and belong to one of ``doc_ids``, if given."""
    by_id = {node.node_id: node for node in nodes}
    passes = build_metadata_filter_fn(lambda node_id: by_id[node_id].metadata, filters)
    wanted = None if doc_ids is None else set(doc_ids)
    return [
        node for node_id, node in by_id.items() if passes(node_id) and (wanted is None or node.ref_doc_id in wanted)
    ]


def text_start(node: BaseNode, mode: MetadataMode) -> int:
    """Return where a node's own text begins in ``node.get_content(mode)``: behind its metadata header, if it has one.

    It is negative where the header is blank and white space at the text's beginning was cut off with it.
    """
    text, shown = node.get_content(MetadataMode.NONE), node.get_content(mode)
    if shown == text:
        return 0
    template = str(getattr(node, "text_template", DEFAULT_TEXT_NODE_TMPL))
    header = node.get_metadata_str(mode).strip()
    whole, before = template.format(content=text, metadata_str=header), ""
    for literal, name, _, _ in Formatter().parse(template):
        before += literal
        if name == "content":
            break
        before += header if name == "metadata_str" else ""
    return len(before) - (len(whole) - len(whole.lstrip()))
