"""Hand memories to agents as tools: remember, recall and forget, and a question to an index.

The functions' docstrings are what a model reads. Nothing is decided here.
"""

from __future__ import annotations

import asyncio

from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.vector_stores.types import MetadataFilters

from focus_core.errors import ConfigError
from focus_integrations.llama_index.index import FocusMemoryIndex
from focus_integrations.llama_index.memory import FocusMemoryBlock


def memory_tools(block: FocusMemoryBlock, session_id: str = "", top_k: int = 3) -> list[FunctionTool]:
    """Return the tools ``remember``, ``recall`` and ``forget`` for one session.

    Args:
        block: where texts are kept.
        session_id: whose memory the tools use.
        top_k: most passages that ``recall`` returns.
    """

    async def remember(text: str) -> str:
        """Keep a fact for later conversations. Returns the id of the memory."""
        return await asyncio.to_thread(block.remember, text, session_id)

    async def recall(question: str) -> str:
        """Find what was remembered about a question. Returns passages with the ids of their memories."""
        found = await asyncio.to_thread(block.recall, question, session_id, top_k)
        lines = [f"[{item.document.id}] {item.passage}" for item in found]
        return "\n\n".join(lines) or "Nothing is remembered."

    async def forget(memory_id: str) -> str:
        """Forget the memory of an id."""
        try:
            await asyncio.to_thread(block.forget, memory_id, session_id)
        except ConfigError as error:
            return str(error)
        return f"Forgot {memory_id}."

    return [FunctionTool.from_defaults(async_fn=function) for function in (remember, recall, forget)]


def index_tool(
    index: FocusMemoryIndex,
    name: str = "ask_documents",
    description: str = "Answers a question over all documents at once.",
    *,
    filters: MetadataFilters | None = None,
    max_tokens: int = 128,
) -> QueryEngineTool:
    """Return a tool that asks an index.

    Args:
        index: what the tool reads.
        name: the model calls it so.
        description: tells the model what the documents are about.
        filters: metadata filters that choose the nodes to read.
        max_tokens: most tokens of an answer.
    """
    engine = index.as_query_engine(filters=filters, max_tokens=max_tokens)
    return QueryEngineTool.from_defaults(engine, name=name, description=description)
