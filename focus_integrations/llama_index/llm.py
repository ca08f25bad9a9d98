"""Run FocusLLM as a LlamaIndex LLM: completions over documents and prompts of any length.

A query engine built on it may hand over as many nodes as it likes: what passes the window becomes memory chunks instead
of being cut off. The model is loaded at first use and shared by the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from focus_core.engine import Answer, AnswerStream, FocusEngine
from focus_core.memory import Memory
from focus_integrations._engines import MemoryHolder, shared_engine, source_dicts, start, to_documents

CAPACITY = 1_000_000
"""Tokens that a prompt may have: memory has no window, so this is what a laptop's RAM holds of chunk KV."""


class FocusLLM(CustomLLM):
    """A local model that reads documents and prompts longer than its window.

    Example:
        >>> from focus_integrations.llama_index import FocusLLM
        >>> FocusLLM(documents="contracts/").complete("Who signed the lease?").text  # doctest: +SKIP
    """

    model: str | None = Field(
        default=None, description="Base: hub name, folder or GGUF file; installed default if None."
    )
    adapter: str | None = Field(default=None, description="Adapter folder or hub name; the shipped one if None.")
    documents: Any = Field(
        default=None, description="What every call reads: path, texts, documents or nodes.", exclude=True
    )
    memory_path: str | None = Field(default=None, description="Folder of a saved memory to read.")
    template: str = Field(default="chat", description="chat, question (short answers) or raw.")
    max_tokens: int = Field(default=128, description="Most tokens of an answer.")
    temperature: float = Field(default=0.0, description="0 is greedy.")
    seed: int | None = Field(default=None, description="Makes sampling reproducible.")
    chunk_size: int | None = Field(default=None, description="Most tokens of a chunk.")
    device: str | None = Field(default=None, description="cpu or cuda.")

    _engine: FocusEngine | None = PrivateAttr(default=None)
    _holder: MemoryHolder = PrivateAttr(default_factory=MemoryHolder)

    def __init__(self, *, engine: FocusEngine | None = None, **values: Any) -> None:
        values.setdefault("messages_to_prompt", messages_to_prompt)
        super().__init__(**values)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Name used in serialised settings."""
        return "FocusLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Tell how much a prompt may hold: memory plus local context."""
        return LLMMetadata(
            context_window=CAPACITY,
            num_output=self.max_tokens,
            is_chat_model=False,
            model_name=self.model or "focusllm",
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt of any length."""
        with self._start(prompt, kwargs) as stream:
            return _response(stream.answer)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer piece by piece: ``text`` grows, ``delta`` is new."""
        stream = self._start(prompt, kwargs)

        def pieces() -> CompletionResponseGen:
            text = ""
            with stream:
                for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield _response(stream.answer, text)

        return pieces()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer without blocking the event loop."""

        def work() -> CompletionResponse:
            with self._start(prompt, kwargs) as stream:
                return _response(stream.answer)

        return await asyncio.to_thread(work)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Stream without blocking the event loop."""
        stream = await asyncio.to_thread(self._start, prompt, kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text, source = "", iter(stream)
            try:
                while (piece := await asyncio.to_thread(next, source, None)) is not None:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield _response(stream.answer, text)
            finally:
                stream.cancel()

        return pieces()

    def _start(self, prompt: str, kwargs: dict[str, Any]) -> AnswerStream:
        names = ("max_tokens", "temperature", "seed")
        options = {name: kwargs.get(name, getattr(self, name)) for name in names} | {"stop": kwargs.get("stop") or ()}
        extra = to_documents(kwargs["documents"]) if kwargs.get("documents") else []
        return start(self._get_engine(), prompt, self._get_memory(), extra, template=self.template, **options)

    def _get_engine(self) -> FocusEngine:
        return self._engine or shared_engine(self.model, self.adapter, self.chunk_size, self.device)

    def _get_memory(self) -> Memory | None:
        return self._holder.get(self._get_engine(), self.documents, self.memory_path)


def messages_to_prompt(messages: Sequence[ChatMessage]) -> str:
    """Join chat messages into one prompt; a single message is taken as it is."""
    if len(messages) == 1:
        return messages[0].content or ""
    return "\n\n".join(f"{message.role.value}: {message.content or ''}" for message in messages)


def _response(answer: Answer, text: str | None = None) -> CompletionResponse:
    usage = {
        "prompt_tokens": answer.usage.local + answer.usage.memory,
        "completion_tokens": answer.usage.generated,
        "total_tokens": answer.usage.local + answer.usage.memory + answer.usage.generated,
    }
    return CompletionResponse(
        text=answer.text if text is None else text,
        delta="" if text is not None else None,
        raw={"usage": usage, "finish_reason": answer.finish_reason},
        additional_kwargs={**usage, "sources": source_dicts(answer)},
    )
