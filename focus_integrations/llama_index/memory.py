"""Give agents a memory that forgets nothing: turns that leave the chat window become chunks the model reads.

Nothing is summarised and nothing is embedded. Each session has a memory of its own. A block is put into a LlamaIndex
``Memory``; the model that should read it is :meth:`FocusMemoryBlock.reader`. The prompt stays as it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from pathlib import Path
from typing import Any, Self

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.memory.memory import BaseMemoryBlock

from focus_core.corpus import Document
from focus_core.errors import ConfigError, StoreError
from focus_core.memory import Memory
from focus_core.store import write_atomically
from focus_integrations.llama_index._messages import to_messages
from focus_integrations.llama_index.llm import FocusLLM

FORMAT = 1
MANIFEST = "focus_block.json"


class FocusMemoryBlock(BaseMemoryBlock[str]):
    """Keeps evicted turns and remembered facts as memory chunks, per session.

    Example:
        >>> block = FocusMemoryBlock(llm=FocusLLM())  # doctest: +SKIP
        >>> memory = Memory.from_defaults(session_id="anna", token_limit=2000, memory_blocks=[block])  # doctest: +SKIP
        >>> agent = FunctionAgent(tools=tools, llm=block.reader("anna"))  # doctest: +SKIP
        >>> await agent.run("What did I tell you about the lease?", memory=memory)  # doctest: +SKIP
    """

    name: str = Field(default="LongMemory", description="Name of the block.")
    llm: FocusLLM = Field(description="Model whose engine reads the turns.")
    inject_top_k: int = Field(
        default=0,
        ge=0,
        description="Best passages to write into the prompt as well, for models that cannot read the memory itself.",
    )

    _memories: dict[str, Memory] = PrivateAttr(default_factory=dict)
    _counts: dict[str, int] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=threading.RLock)

    # -- LlamaIndex ---------------------------------------------------------------------------------------------

    async def _aput(self, messages: list[ChatMessage]) -> None:
        """Read turns that left the chat window; neighbours of one session share a document."""
        batches: dict[str, list[ChatMessage]] = {}
        for message in messages:
            batches.setdefault(str(message.additional_kwargs.get("session_id") or ""), []).append(message)
        for session, turns in batches.items():
            text = "\n".join(filter(None, map(_written, turns)))
            if text:
                await asyncio.to_thread(self.remember, text, session)

    async def _aget(
        self, messages: list[ChatMessage] | None = None, session_id: str | None = None, **block_kwargs: Any
    ) -> str:
        """Return nothing to add to the prompt, or the best passages if ``inject_top_k`` asks for them."""
        asked = [message.content for message in messages or [] if message.role == "user" and message.content]
        if not self.inject_top_k or not asked:
            return ""
        found = await asyncio.to_thread(self.recall, asked[-1], session_id or "", self.inject_top_k)
        return "\n\n".join(str(source["text"]) for source in found)

    # -- direct use ---------------------------------------------------------------------------------------------

    def memory(self, session_id: str = "") -> Memory:
        """Return a session's memory; it may be empty."""
        with self._lock:
            if session_id not in self._memories:
                self._memories[session_id] = Memory(self.llm.engine.encoder)
            return self._memories[session_id]

    def reader(self, session_id: str = "", **changes: Any) -> FocusLLM:
        """Return a model that reads a session's memory in every call.

        Args:
            session_id: that of the LlamaIndex ``Memory``.
            **changes: fields of the model to set, such as ``max_tokens``.
        """
        return self.llm.with_memory(lambda: self.memory(session_id), **changes)

    def remember(self, text: str, session_id: str = "") -> str:
        """Keep a text.

        Returns:
            Its id, for :meth:`forget`.

        Raises:
            ConfigError: the text is empty.
        """
        if not text.strip():
            raise ConfigError("there is nothing to remember in an empty text")
        with self._lock:
            self._counts[session_id] = self._counts.get(session_id, 0) + 1
            name = f"memory-{self._counts[session_id]}"
        self.memory(session_id).add([Document(name, text, {"session_id": session_id})])
        return name

    def recall(self, question: str, session_id: str = "", top_k: int = 3) -> list[dict[str, Any]]:
        """Return what a question gives most attention, best first.

        Returns:
            Dictionaries with ``document_id``, ``score``, ``start``, ``end`` and ``text``.
        """
        if not len(self.memory(session_id)):
            return []
        reader = self.reader(session_id, max_sources=top_k)
        found: list[dict[str, Any]] = reader.complete(question, template="question", max_tokens=1).raw["focus"][
            "sources"
        ]
        return found

    def forget(self, memory_id: str, session_id: str = "") -> None:
        """Forget one text.

        Raises:
            ConfigError: the id is unknown in this session.
        """
        self.memory(session_id).remove([memory_id])

    # -- persistence --------------------------------------------------------------------------------------------

    def persist(self, persist_dir: str | Path) -> None:
        """Write all sessions with their chunk KV to a folder; writing again adds only what is new."""
        folder = Path(persist_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            sessions = {name: memory for name, memory in self._memories.items() if len(memory)}
            for name, memory in sessions.items():
                memory.save(folder / _folder_of(name))
            manifest = {"format": FORMAT, "sessions": {name: self._counts.get(name, 0) for name in sessions}}
        write_atomically(folder / MANIFEST, json.dumps(manifest).encode())

    @classmethod
    def load(cls, persist_dir: str | Path, llm: FocusLLM, **fields: Any) -> Self:
        """Read what :meth:`persist` wrote; nothing is computed.

        Args:
            persist_dir: the folder.
            llm: the model that read the turns.
            **fields: of the block.

        Raises:
            StoreError: there is no block, it is damaged, or it is another model's.
        """
        path = Path(persist_dir) / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            sessions: dict[str, int] = dict(manifest["sessions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"no memory block in {persist_dir} ({error}); persist one there first") from error
        if manifest.get("format") != FORMAT:
            raise StoreError(f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}")
        block = cls(llm=llm, **fields)
        for name, count in sessions.items():
            block._memories[name] = llm.engine.load_memory(Path(persist_dir) / _folder_of(name))
            block._counts[name] = count
        return block


def _written(message: ChatMessage) -> str:
    """Return a turn as text, its tool calls included."""
    (turn,), _ = to_messages([message])
    calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in turn.tool_calls]
    said = "\n".join(filter(None, [turn.content.strip(), *calls]))
    return f"{message.role.value}: {said}" if said else ""


def _folder_of(session_id: str) -> str:
    return f"session-{hashlib.sha256(session_id.encode()).hexdigest()[:16]}"
