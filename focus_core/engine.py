"""Answer questions over a memory: the facade that everything else is built on.

:class:`FocusEngine` joins base, adapter, tokenizer and memory; at inference it is the only module that sees a prompt.
It is safe to use from several threads: requests that run at the same time pass the model together, step by step.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from focus_core.answers import Answer, AnswerStream
from focus_core.config import DecodeConfig, FocusConfig, LocalMode, Positions
from focus_core.errors import ConfigError
from focus_core.generation import Generation, check_cancelled
from focus_core.hardware import free_bytes
from focus_core.method.encoding import Check
from focus_core.method.layout import sink_before
from focus_core.method.passes import SharedPasses
from focus_core.method.ranks import Ranks
from focus_core.method.reading import Reading, check_window
from focus_core.method.room import run_together
from focus_core.method.state import MemoryState
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.chat import Message, Tool
from focus_core.model.constraints import Grammar, tool_calls
from focus_core.model.families import BaseDecoder
from focus_core.model.fitting import fitted, sink_of
from focus_core.model.hub import AdapterInfo, LoadedBase, attach, find_adapter, load_adapter, load_base, read_info
from focus_core.model.sources import Notice
from focus_core.prompts import Prompts, Template
from focus_core.store.database import Store
from focus_core.store.encoder import ChunkEncoder
from focus_core.store.memory import Memory, Progress
from focus_core.store.places import Place, find_place
from focus_core.text.corpus import Document, Documents, as_documents, distinct
from focus_core.text.tokenization import TextTokenizer

UNTRAINED = "untrained"
_NO_QUESTION = "the question is empty; ask something"


class FocusEngine:
    """A base with its adapter, ready to read and answer. Usually made by :meth:`from_pretrained`.

    Args:
        loaded: the base.
        info: settings of the adapter.
        adapter: candidate projections attached to ``loaded``'s model; made untrained if not given.
        base: ``loaded``'s decoder, if it is there already.
        tokenizer: ``loaded``'s, if it is there already.
        passes: of an engine with the same weights, whose requests then share sweeps with this one's.
        ranks: processes that share the chunks of every memory; each asks the same questions, one at a time.

    Raises:
        UnsupportedModelError: the settings ask for what the base cannot do.
    """

    def __init__(
        self,
        loaded: LoadedBase,
        info: AdapterInfo,
        adapter: CandidateAdapter | None = None,
        *,
        base: BaseDecoder | None = None,
        tokenizer: TextTokenizer | None = None,
        passes: SharedPasses | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self.loaded, self.info = loaded, info
        self.base = base or BaseDecoder(loaded.model)
        self.config = fitted(info.focus, self.base)
        self.adapter = adapter or CandidateAdapter(self.base)
        self.passes = passes or SharedPasses(self.base, self.adapter)
        self.tokenizer = tokenizer or TextTokenizer(loaded.tokenizer)
        self.sink = sink_of(loaded) if self.config.sink else None
        declined = self.tokenizer.encode(info.not_there) if info.not_there else []
        self._declining = declined[0] if declined else None
        self.encoder = ChunkEncoder(self.base, self.tokenizer, self.config, self.sink, loaded.fingerprint)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        window: int | None = None,
        chunk_size: int | None = None,
        prompt_length: int | None = None,
        positions: Positions | None = None,
        local_mode: LocalMode | None = None,
        other_base: bool = False,
        quantize: str | None = None,
        notice: Notice = lambda text: None,
    ) -> Self:
        """Load a base and its adapter.

        Args:
            base: one of :data:`focus_core.model.bases.BASES`, hub name, folder or GGUF file; ``None`` for the installed
                default.
            adapter: folder or hub name; ``None`` for the one shipped for this base; ``"untrained"`` for copies of the
                base's own projections.
            dtype: of the weights; chosen for the hardware if not given.
            device: chosen if not given.
            window: most tokens of a row, 4096 or the base's if that is smaller.
            chunk_size: most tokens of a chunk; the adapter's if not given.
            prompt_length: most tokens of the dynamic prompt.
            positions: ``shared`` or ``ordered``; a trained adapter knows one only.
            local_mode: ``incremental`` or ``exact``; a trained adapter knows one only.
            other_base: let the adapter serve other weights than those it was trained for, if the shapes fit.
            quantize: ``int8`` or ``int4`` keeps the base's matrices in so many bits, see
                :func:`~focus_core.model.hub.load_base`.
            notice: told about long work.

        Raises:
            BaseModelError: the base cannot be loaded.
            AdapterError: there is no adapter, or it is another base's.
        """
        loaded = load_base(base, dtype=dtype, device=device, quantize=quantize, notice=notice)
        decoder = BaseDecoder(loaded.model)
        folder = None if adapter == UNTRAINED else find_adapter(adapter, loaded)
        attached = CandidateAdapter(decoder) if folder is None else attach(decoder, read_info(folder))
        try:
            if folder is not None:
                info = load_adapter(folder, attached, loaded, other_base=other_base)
            else:
                positions_known: Positions = "shared" if decoder.rotary else "ordered"
                window_known = min(4096, decoder.window)
                prompt = min(512, max(1, window_known // 4))
                focus = FocusConfig(
                    window=window_known,
                    chunk_size=min(512, window_known - prompt - 2),
                    prompt_length=prompt,
                    positions=positions_known,
                )
                info = AdapterInfo(loaded.name, loaded.fingerprint, focus)
            given: dict[str, Any] = {
                "window": window,
                "chunk_size": chunk_size,
                "prompt_length": prompt_length,
                "positions": positions,
                "local_mode": local_mode,
            }
            focus = replace(info.focus, **{name: value for name, value in given.items() if value is not None})
            return cls(loaded, replace(info, focus=focus), attached, base=decoder)
        except BaseException:
            attached.detach()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or copied, alone or inside something else."""
        raise ConfigError(
            "an engine lives in one process and cannot be pickled or copied; make one where it is needed "
            "(FocusEngine.from_pretrained), and share documents through a saved memory"
        )

    def close(self) -> None:
        """Detach the adapter: the base is as it was before."""
        self.adapter.detach()

    def with_config(self, **changes: Any) -> FocusEngine:
        """Return an engine with other :class:`FocusConfig` settings that shares this one's weights."""
        info = replace(self.info, focus=replace(self.config, **changes))
        return FocusEngine(
            self.loaded,
            info,
            self.adapter,
            base=self.base,
            tokenizer=self.tokenizer,
            passes=self.passes,
            ranks=self.ranks,
        )

    def with_ranks(self, ranks: Ranks) -> FocusEngine:
        """Return an engine that shares the chunks of every memory with other processes, and this one's weights."""
        engine = self.with_config()
        engine.ranks = ranks
        return engine

    @property
    def prompts(self) -> Prompts:
        """How questions are put."""
        return Prompts(self.tokenizer, self.config, self.info)

    @cached_property
    def adapter_fingerprint(self) -> str:
        """Hash of the candidate projections as they were when it was first asked for."""
        digest = hashlib.sha256()
        for key, value in sorted(self.adapter.state_dict().items()):
            digest.update(key.encode() + value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # -- memory -------------------------------------------------------------------------------------------------

    def remember(
        self,
        documents: Documents,
        *,
        store: Store | str | Path | None = None,
        packed: bool = False,
        progress: Progress = lambda done, total: None,
        check: Check = lambda: None,
    ) -> Memory:
        """Read documents into a new memory; their chunk KV is computed once.

        Args:
            documents: documents, texts, or paths (:class:`pathlib.Path`) of files and folders; one or many. A string
                alone may be a path too; if it looks like one, it must be there.
            store: folder that keeps chunk KV while it is computed, so that a stopped run resumes.
            packed: let short documents share chunks.
            progress: called with tokens done and to do.
            check: called often; raises to cancel.

        Raises:
            CorpusError: something cannot be read, or there is nothing to read.
            OutOfMemoryError: the chunk KV does not fit.
        """
        memory = Memory(self.encoder, Store(store) if isinstance(store, (str, Path)) else store)
        memory.add(as_documents(documents), packed=packed, progress=progress, check=check)
        return memory

    def load_memory(
        self,
        place: str | Path | Place,
        progress: Progress = lambda done, total: None,
        *,
        name: str | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> Memory:
        """Open a saved memory; nothing is computed or written, and chunk KV is read when a question needs it.

        Args:
            place: folder written by :meth:`Memory.save`, or the name of a collection in the user's own store.
            progress: called with tokens done and to do.
            name: of the collection in ``place``, where it holds several.
            where: metadata of the documents to read, chosen in the database: for each key a value that must be equal,
                or operators, as in ``{"year": {"$gte": 2020}, "kind": {"$in": ["lease", "deed"]}}``.

        Raises:
            StoreError: there is none, it is damaged, or it was made by another model.
            ConfigError: ``where`` cannot be read.
        """
        found = find_place(place, name)
        store, encoder = found.open(), self.encoder
        written = store.collection(found.name).facts.get("kv", "base")
        if written != self.config.kv_format:  # the format is the collection's affair
            encoder = replace(encoder, config=replace(encoder.config, kv_format=written))
        ids = store.select(found.name, where) if where is not None else None
        return Memory.load(store, encoder, progress, name=found.name, ids=ids)

    # -- answers ------------------------------------------------------------------------------------------------

    def stream(
        self,
        question: str,
        memory: Memory | None = None,
        *,
        decode: DecodeConfig | None = None,
        template: Template = "question",
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Answer piece by piece.

        Args:
            question: the local context; it must fit the window.
            memory: what to read; ``None`` asks the base alone.
            decode: sampling options.
            template: ``question`` puts it as the adapter was trained, ``chat`` as a plain user turn, ``raw`` as text
                to be continued.
            cancelled: an event that stops the request when set.
            **options: single fields of :class:`DecodeConfig`, over ``decode``.

        Raises:
            ConfigError: an option is unknown or out of bounds, or the memory is another engine's.
            ContextTooLongError: the question does not fit the window.
        """
        if not question.strip() and template != "raw":
            raise ConfigError(_NO_QUESTION)
        local = self.local_ids(question, template)
        opening = self.prompts.opening(local, template)
        return self.stream_ids(local, memory, decode=decode, cancelled=cancelled, opening=opening, **options)

    def answer(self, question: str, memory: Memory | None = None, **arguments: Any) -> Answer:
        """Answer at once; takes what :meth:`stream` takes."""
        return self.stream(question, memory, **arguments).answer

    def answer_many(
        self,
        questions: Sequence[str],
        memory: Memory | None = None,
        *,
        cancelled: threading.Event | None = None,
        **arguments: Any,
    ) -> list[Answer]:
        """Answer several questions, which pass the model together; takes what :meth:`stream` takes.

        As many run at the same time as half of the free memory holds what they add behind the chunks.
        Sampling with one ``seed`` draws the same numbers for each of them. In bfloat16 an answer may differ in its last
        bits, and so in a close choice, from the same question asked alone.
        """
        cancelled = cancelled or threading.Event()
        if self.ranks is not None:
            return [self.answer(question, memory, cancelled=cancelled, **arguments) for question in questions]
        return run_together(
            lambda question: self.answer(question, memory, cancelled=cancelled, **arguments), questions, cancelled
        )

    def stream_ids(
        self,
        local: list[int],
        memory: Memory | None = None,
        *,
        decode: DecodeConfig | None = None,
        cancelled: threading.Event | None = None,
        constraint: Grammar | None = None,
        opening: int = 0,
        **options: Any,
    ) -> AnswerStream:
        """Like :meth:`stream`, for a local context given as token ids.

        A ``constraint`` holds the answer to a grammar; raises ``ConfigError`` where ``max_tokens`` is too small for it.
        The first ``opening`` tokens are those that other questions begin with too: what they are behind every chunk is
        computed once while the memory stays as it is.
        """
        if not local:
            raise ConfigError(_NO_QUESTION)
        decode = _decode(decode, options)
        if decode.chunk_top_p is None:
            decode = replace(decode, chunk_top_p=self.info.chunk_top_p)
        if decode.reread is None:
            decode = replace(decode, reread=self.info.reread)
        if memory is not None and (memory.encoder.base is not self.base or memory.encoder.sink != self.sink):
            raise ConfigError("this memory belongs to another engine; save it and load it with this one's load_memory")
        state = memory.state if memory is not None else MemoryState({}, (), ())
        check_window(self.base, self.config, len(sink_before(local, self.sink)) + len(local), decode.max_tokens)
        generation = Generation(
            self.reading(state, max_tokens=decode.max_tokens, chunks_per_batch=decode.chunks_per_batch),
            self.tokenizer,
            decode,
            self.end_tokens,
            self.info.attribution_heads,
            cancelled or threading.Event(),
            constraint.begin(self.tokenizer, self.end_tokens, decode.max_tokens) if constraint is not None else None,
            opening,
            self._declining,
        )
        return AnswerStream(generation, local, state, self.info.support)

    # -- conversations ------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        memory: Memory | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel: bool = True,
        schema: Mapping[str, Any] | bool | None = None,
        decode: DecodeConfig | None = None,
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Answer the last message of a conversation of any length.

        Turns that do not fit the window are read as memory for this answer; what ``memory`` holds stays as it is.
        Tool calls are in the text; :class:`~focus_core.model.tool_calls.ToolCallParser` reads them.

        Args:
            messages: oldest first; without a system turn the adapter's is put in front.
            memory: what to read besides.
            tools: what the model may call.
            tool_choice: ``auto``, ``none``, ``required`` or a tool's name.
            parallel: whether several calls may follow each other.
            schema: JSON schema that the answer must be a value of if no tool is called; ``True`` for any JSON.
            decode: sampling options.
            cancelled: an event that stops the request when set.
            **options: single fields of :class:`DecodeConfig`, over ``decode``.

        Raises:
            ConfigError: an option, a tool or the schema is bad, or llguidance is needed and not installed.
            ContextTooLongError: the last turn with the tools does not fit the window.
        """
        if not messages or (messages[-1].role == "user" and not messages[-1].content.strip()):
            raise ConfigError(_NO_QUESTION)
        decode, cancelled = _decode(decode, options), cancelled or threading.Event()
        constraint = tool_calls(tools, tool_choice, parallel, schema=schema)
        offered = () if tool_choice == "none" else tools
        documents, kept = self.fit(messages, offered, decode.max_tokens)
        if documents:
            memory = memory.subset(document.id for document in memory.documents) if memory else self.remember([])
            memory.add(distinct(documents, memory.documents), check=lambda: check_cancelled(cancelled))
        local, opening = self.prompts.conversation(kept, offered)
        return self.stream_ids(
            local, memory, decode=decode, cancelled=cancelled, constraint=constraint, opening=opening
        )

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """See :meth:`Prompts.with_system`."""
        return self.prompts.with_system(messages)

    def fit(
        self, messages: Sequence[Message], tools: Sequence[Tool], max_tokens: int
    ) -> tuple[list[Document], list[Message]]:
        """See :meth:`Prompts.fit`."""
        return self.prompts.fit(messages, tools, max_tokens)

    def local_ids(self, text: str, template: Template = "question") -> list[int]:
        """See :meth:`Prompts.local_ids`."""
        return self.prompts.local_ids(text, template)

    def split_prompt(self, text: str, whole: int | None = None) -> tuple[str, str]:
        """See :meth:`Prompts.split_prompt`."""
        return self.prompts.split_prompt(text, whole)

    def reading(self, state: MemoryState, *, max_tokens: int, chunks_per_batch: int | None = None) -> Reading:
        """Return a :class:`Reading` of a memory's state: logits instead of text, for tests and measurements."""
        return Reading(
            self.base,
            self.adapter,
            self.config,
            state,
            self.sink,
            max_tokens=max_tokens,
            chunks_per_batch=chunks_per_batch,
            passes=self.passes,
            ranks=self.ranks,
        )

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of plain text."""
        return len(self.tokenizer.encode(text))

    @property
    def capacity(self) -> int:
        """Tokens that memory and window hold: half of the memory that is free now, as chunk KV.

        This is what fits, not what an adapter answers well over; docs/experiments.md has what was measured.
        """
        size = self.config.chunk_size
        return free_bytes(self.base.device) // 2 // self.encoder.shape.nbytes(size, 1) * size + self.config.window

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        known = getattr(self.loaded.model.generation_config, "eos_token_id", None)
        several = known if isinstance(known, list) else [known]
        own = self.loaded.tokenizer.eos_token_id
        return frozenset(int(token) for token in [*several, own] if token is not None)


def _decode(decode: DecodeConfig | None, options: Mapping[str, Any]) -> DecodeConfig:
    values = {**(decode or DecodeConfig()).to_dict(), **options}
    if isinstance(values["stop"], str):
        values["stop"] = (values["stop"],)
    values["stop"] = tuple(values["stop"] or ())
    return DecodeConfig.from_dict(values)
