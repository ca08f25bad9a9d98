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

from focus_core.errors import ConfigError
from focus_core.session.long_memory import LongMemory, Recalled
from focus_integrations.llama_index._messages import to_messages
from focus_integrations.llama_index.llm import FocusLLM


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
    folder: str | None = Field(
        default=None, description="Where all sessions are saved at every change; in this process only if None."
    )
    inject_top_k: int = Field(
        default=0,
        ge=0,
        description="Best passages to write into the prompt as well, for models that cannot read the memory itself.",
    )

    _sessions: dict[str, LongMemory] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=threading.RLock)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Share what is remembered: a copy of an agent has the same memory."""
        return self

    def __getstate__(self) -> dict[Any, Any]:
        """Return the settings: another process reads the sessions out of the folder.

        Raises:
            ConfigError: there is no folder.
        """
        if self.folder is None:
            raise ConfigError(
                "a memory block without folder= lives in one process and cannot be pickled; give a folder"
            )
        return {name: getattr(self, name) for name in type(self).model_fields}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Begin with no session open."""
        self.__init__(**state)  # type: ignore[misc]

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
        return "\n\n".join(item.passage for item in found)

    # -- direct use ---------------------------------------------------------------------------------------------

    def session(self, session_id: str = "") -> LongMemory:
        """Return what a session remembers; with a ``folder``, what it remembered in earlier processes too."""
        with self._lock:
            if session_id not in self._sessions:
                place = Path(self.folder) / _folder_of(session_id) if self.folder is not None else None
                self._sessions[session_id] = LongMemory(place, engine=self.llm.engine)
            return self._sessions[session_id]

    def reader(self, session_id: str = "", **changes: Any) -> FocusLLM:
        """Return a model that reads a session's memory in every call.

        Args:
            session_id: that of the LlamaIndex ``Memory``.
            **changes: fields of the model to set, such as ``max_tokens``.
        """
        return self.llm.with_memory(lambda: self.session(session_id).memory, **changes)

    def remember(self, text: str, session_id: str = "") -> str:
        """Keep a text and return its id, which is the same for the same text.

        Raises:
            ConfigError: the text is empty.
        """
        return self.session(session_id).remember(text, metadata={"session_id": session_id})

    def recall(self, question: str, session_id: str = "", top_k: int = 3) -> list[Recalled]:
        """Return the texts with most attention for a question, best first."""
        return self.session(session_id).recall(question, top_k)

    def forget(self, memory_id: str, session_id: str = "") -> None:
        """Forget one text.

        Raises:
            ConfigError: the id is unknown in this session.
        """
        if not self.session(session_id).forget([memory_id]):
            raise ConfigError(f"nothing is remembered under {memory_id!r}; recall gives the ids that are")


def _written(message: ChatMessage) -> str:
    """Return a turn as text, its tool calls and attachments included; what is no text is skipped and logged."""
    (turn,), attached = to_messages([message], skip=True)
    calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in turn.tool_calls]
    files = [f"[{document.metadata['title']}]\n{document.text}" for document in attached]
    said = "\n".join(filter(None, [turn.content.strip(), *calls, *files]))
    return f"{message.role.value}: {said}" if said else ""


def _folder_of(session_id: str) -> str:
    return f"session-{hashlib.sha256(session_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
