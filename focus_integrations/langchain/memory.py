"""Give LangChain agents a memory that outlives the process: tools, a document store, middleware, a langgraph store.

All stand on one :class:`~focus_core.session.long_memory.LongMemory`, so what a tool remembers the model reads. Nothing
is summarised away: what leaves the conversation is kept word for word. Middleware and store need their frameworks and
live in modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from langchain_core.documents import Document as Page
from langchain_core.runnables.config import ensure_config
from langchain_core.stores import BaseStore
from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field

from focus_core.session.long_memory import LongMemory
from focus_core.text.corpus import Document

THREAD = "thread"
"""Metadata key of what was said in one conversation: only that conversation sees it."""
STORE_ITEM = "langgraph_item"
"""Metadata key of an item of langgraph's store: it belongs to a namespace, and no conversation sees it."""
_OWN_ID = "langchain_id"


def thread_of_call() -> str:
    """Return the ``thread_id`` of the graph's run that this is called in, ``""`` where there is none."""
    thread = ensure_config().get("configurable", {}).get("thread_id")
    return "" if thread is None else str(thread)


def visible_in(thread: str) -> Callable[[Document], bool]:
    """Return a filter that keeps shared notes and what was said in a thread; without a thread notes alone."""

    def visible(document: Document) -> bool:
        own = document.metadata.get(THREAD)
        shared = own is None and STORE_ITEM not in document.metadata
        return shared or (bool(thread) and own == thread)

    return visible


class _RememberInput(BaseModel):
    text: str = Field(description="What to remember, in full sentences.")


class _RecallInput(BaseModel):
    query: str = Field(description="What to look for.")


class _ForgetInput(BaseModel):
    id: str = Field(description="Id of the note, as recall shows it.")


class _MemoryTool(BaseTool):
    """A tool over a :class:`LongMemory`; without one it keeps notes in this process only.

    What :class:`FocusMemoryMiddleware` moved from a conversation is seen in that conversation only.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    memory: LongMemory = Field(default_factory=LongMemory, exclude=True)


class RememberTool(_MemoryTool):
    """Lets an agent keep a note."""

    name: str = "remember"
    description: str = "Keep a note for later conversations. Returns its id."
    args_schema: type[BaseModel] = _RememberInput

    def _run(self, text: str) -> str:
        return f"remembered as {self.memory.remember(text)}"


class RecallTool(_MemoryTool):
    """Lets an agent look up notes; the artifact holds them with scores."""

    name: str = "recall"
    description: str = "Look up what was remembered, in this conversation or before."
    args_schema: type[BaseModel] = _RecallInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    k: int = 4

    def _run(self, query: str) -> tuple[str, list[dict[str, Any]]]:
        found = self.memory.recall(query, self.k, visible_in(thread_of_call()))
        lines = [f"[{item.document.id}] {item.passage.strip()}" for item in found]
        artifact = [{"id": item.document.id, "text": item.document.text, "score": item.score} for item in found]
        return "\n".join(lines) or "nothing was remembered", artifact


class ForgetTool(_MemoryTool):
    """Lets an agent remove a note."""

    name: str = "forget"
    description: str = "Remove a note by its id."
    args_schema: type[BaseModel] = _ForgetInput

    def _run(self, id: str) -> str:
        known = (document for document in self.memory.documents if document.id == id)
        seen = any(map(visible_in(thread_of_call()), known))
        gone = seen and self.memory.forget([id])
        return f"forgot {id}" if gone else f"there is no note {id!r}; recall shows the ids"


def memory_tools(memory: LongMemory) -> list[BaseTool]:
    """Return the tools remember, recall and forget over one memory."""
    return [RememberTool(memory=memory), RecallTool(memory=memory), ForgetTool(memory=memory)]


class FocusDocumentStore(BaseStore[str, Page]):
    """Documents by key, kept in a memory that models read: whatever writes to a document store fills the memory.

    Args:
        memory: holds them.
    """

    def __init__(self, memory: LongMemory) -> None:
        self.memory = memory

    def mset(self, key_value_pairs: Sequence[tuple[str, Page]]) -> None:
        """Keep documents; raises ``EmptyCorpusError`` for one without text."""
        self.memory.put(
            Document(key, page.page_content, {**page.metadata, _OWN_ID: page.id}) for key, page in key_value_pairs
        )

    def mget(self, keys: Sequence[str]) -> list[Page | None]:
        """Return documents, ``None`` for keys that are not there."""
        known = {document.id: document for document in self.memory.documents}
        return [_page(known[key]) if key in known else None for key in keys]

    def mdelete(self, keys: Sequence[str]) -> None:
        """Remove documents; keys that are not there are no error."""
        self.memory.forget(keys)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Yield the keys that begin with ``prefix``."""
        yield from [one.id for one in self.memory.documents if one.id.startswith(prefix or "")]


def _page(document: Document) -> Page:
    metadata = dict(document.metadata)
    return Page(page_content=document.text, id=metadata.pop(_OWN_ID, None), metadata=metadata)
