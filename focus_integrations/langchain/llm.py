"""Run FocusLLM as a LangChain LLM: text in, text out, over documents and prompts of any length.

Only the underscore methods of BaseLLM are written; chains, batch, async and tracing come from langchain-core. The model
is loaded at first use and shared by the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict, Field, PrivateAttr

from focus_core.corpus import Document
from focus_core.engine import Answer, AnswerStream, FocusEngine
from focus_core.memory import Memory
from focus_integrations._engines import MemoryHolder, shared_engine, source_dicts, start, to_documents


class FocusLLM(BaseLLM):
    """A local model that reads documents and prompts longer than its window.

    Example:
        >>> from focus_integrations.langchain import FocusLLM
        >>> llm = FocusLLM(documents="contracts/")
        >>> llm.invoke("Who signed the lease?")  # doctest: +SKIP

    Args:
        model: base model: hub name, folder or GGUF file; the installed default if not given.
        adapter: adapter folder or hub name; the shipped one if not given.
        documents: what every call reads: a path, texts, LangChain documents, or a list of them. The key
            ``documents`` of a call is read besides.
        memory_path: folder of a saved memory to read.
        template: ``chat`` puts prompts as a user turn, ``question`` as the adapter was trained (short answers), ``raw``
            continues them.
        max_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        top_k: sample from the k likeliest.
        seed: makes sampling reproducible.
        stop: strings that end an answer.
        chunk_size: most tokens of a chunk.
        device: ``cpu`` or ``cuda``.
        engine: a loaded engine to use instead of the process's.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=())

    model: str | None = None
    adapter: str | None = None
    documents: Any = None
    memory_path: str | None = None
    template: str = "chat"
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    chunk_size: int | None = None
    device: str | None = None
    engine: FocusEngine | None = Field(default=None, exclude=True, repr=False)

    _holder: MemoryHolder = PrivateAttr(default_factory=MemoryHolder)

    @property
    def _llm_type(self) -> str:
        return "focusllm"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """Everything an answer depends on, the corpus included: this is the LLM cache's key."""
        engine = self._get_engine()
        memory = self._get_memory()
        return {
            "model": engine.loaded.fingerprint,
            "adapter": engine.adapter_fingerprint,
            "focus": engine.config.to_dict(),
            "memory": memory.fingerprint if memory is not None else None,
            "template": self.template,
            **self._sampling(None, {}),
        }

    def get_num_tokens(self, text: str) -> int:
        """Count tokens with the model's own tokenizer."""
        return self._get_engine().count_tokens(text)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own token ids."""
        return self._get_engine().tokenizer.encode(text)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        generations, total = [], {"prompt_tokens": 0, "completion_tokens": 0}
        for prompt in prompts:
            stream = self._start(prompt, stop, kwargs)
            with stream:
                answer = stream.answer
            generations.append([Generation(text=answer.text, generation_info=_info(answer))])
            total["prompt_tokens"] += answer.usage.local + answer.usage.memory
            total["completion_tokens"] += answer.usage.generated
        return LLMResult(generations=generations, llm_output={"token_usage": total, "model_name": self._name()})

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        stream = self._start(prompt, stop, kwargs)
        with stream:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield GenerationChunk(text="", generation_info=_info(stream.answer))

    def _start(self, prompt: str, stop: list[str] | None, kwargs: dict[str, Any]) -> AnswerStream:
        options = self._sampling(stop, kwargs)
        extra: list[Document] = to_documents(kwargs["documents"]) if kwargs.get("documents") else []
        return start(self._get_engine(), prompt, self._get_memory(), extra, template=self.template, **options)

    def _sampling(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        options = {name: kwargs.get(name, getattr(self, name)) for name in names}
        return options | {"stop": tuple(stop or self.stop or ())}

    def _get_engine(self) -> FocusEngine:
        return self.engine or shared_engine(self.model, self.adapter, self.chunk_size, self.device)

    def _get_memory(self) -> Memory | None:
        return self._holder.get(self._get_engine(), self.documents, self.memory_path)

    def _name(self) -> str:
        return self.model or self._get_engine().loaded.name


def _info(answer: Answer) -> dict[str, Any]:
    """Return what chains may want to know: why it ended, token counts, and sources with exact spans."""
    return {
        "finish_reason": answer.finish_reason,
        "usage": {
            "input_tokens": answer.usage.local + answer.usage.memory,
            "output_tokens": answer.usage.generated,
            "memory_tokens": answer.usage.memory,
            "chunks": answer.usage.chunks,
        },
        "sources": source_dicts(answer),
    }
