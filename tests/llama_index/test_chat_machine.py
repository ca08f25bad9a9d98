"""Drive chat engines in every mode through changes, filters, streams and resets; a fresh engine is the oracle.

The oracle is an index that is built anew from the nodes that are there, with a model that has read nothing, and a chat
engine that is given the turns so far. What an engine answers, names as sources and keeps must be the same.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from llama_index.core import Document
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from focus_core.config import FocusConfig
from focus_core.engine import FocusEngine
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint
from focus_integrations.llama_index import FocusLLM, FocusMemoryIndex
from tests.conftest import byte_level_tokenizer, perturb, tiny_model

NAMES = ("cat", "dog", "hat")
OWNERS = ("anna", "ben")
MODES = ("best", "context", "condense_question", "condense_plus_context", "simple")
MESSAGES = ("who sat?", "the hat {x}?", "and the dog " * 30)


@functools.cache
def engine() -> FocusEngine:
    """A random model of two layers with a window of 512 tokens."""
    model = tiny_model("llama", layers=2)
    loaded = LoadedBase(model, byte_level_tokenizer(), "tiny", fingerprint(model))
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base)
    perturb(adapter)
    focus = FocusConfig(window=512, chunk_size=64, prompt_length=64)
    return FocusEngine(loaded, AdapterInfo(loaded.name, loaded.fingerprint, focus), adapter, base=base)


@pytest.fixture(scope="module", autouse=True)
def closed():
    """One event loop for all examples, as LlamaIndex's synchronous code takes the one that is set."""
    asyncio.set_event_loop(loop := asyncio.new_event_loop())
    yield
    loop.close()
    asyncio.set_event_loop(None)
    engine().close()
    engine.cache_clear()


def page(name: str, owner: str, version: int) -> Document:
    return Document(text=f"the {name} of {owner}, {version}. " * 2, doc_id=name, metadata={"owner": owner})


def owned_by(owner: str) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="owner", value=owner)])


@dataclass
class Talk:
    """A chat engine and what is known about it."""

    mode: str
    owner: str | None
    another: bool
    engine: BaseChatEngine
    turns: list[tuple[str, str]] = field(default_factory=list)


def start(index: FocusMemoryIndex, mode: str, owner: str | None, another: bool, turns: Any = ()) -> BaseChatEngine:
    history = [ChatMessage(role=role, content=text) for role, text in turns]
    return index.as_chat_engine(
        chat_mode=mode,
        llm=MockLLM() if another else None,
        filters=owned_by(owner) if owner else None,
        memory=ChatMemoryBuffer.from_defaults(chat_history=history, token_limit=100_000, tokenizer_fn=str.split),
    )


def kept(talk: BaseChatEngine) -> list[tuple[str, str]]:
    return [(message.role.value, message.content or "") for message in talk.chat_history]


def say(talk: BaseChatEngine, message: str, way: str) -> tuple[str, list[Any]]:
    """Text and sources of an answer, asked in one of four ways."""
    if way == "chat":
        found = talk.chat(message)
        return str(found).strip(), found.source_nodes
    if way == "stream":
        found = talk.stream_chat(message)
        return "".join(found.response_gen).strip(), found.source_nodes

    async def later() -> tuple[str, list[Any]]:
        if way == "achat":
            found = await talk.achat(message)
            return str(found).strip(), found.source_nodes
        found = await talk.astream_chat(message)
        return "".join([piece async for piece in found.async_response_gen()]).strip(), found.source_nodes

    return asyncio.get_event_loop().run_until_complete(later())


class Conversations(RuleBasedStateMachine):
    """Up to three conversations over one index."""

    @initialize()
    def begin(self) -> None:
        self.pages = {name: page(name, owner, 0) for name, owner in zip(NAMES, ("anna", "ben", "anna"), strict=True)}
        self.index = FocusMemoryIndex.from_documents(
            list(self.pages.values()), llm=FocusLLM(engine=engine(), max_tokens=3)
        )
        self.talks: list[Talk] = []
        self.versions = 0

    @rule(name=st.sampled_from(NAMES), owner=st.sampled_from(OWNERS), same_text=st.booleans())
    def write(self, name: str, owner: str, same_text: bool) -> None:
        """Insert a page, or give one that is there another owner or text."""
        self.versions += not same_text
        there, new = self.pages.get(name), page(name, owner, self.versions)
        if there is not None:
            self.index.update_ref_doc(new)
        else:
            self.index.insert(new)
        self.pages[name] = new

    @precondition(lambda self: len(self.pages) > 1)
    @rule(which=st.integers(0, 2))
    def delete(self, which: int) -> None:
        name = sorted(self.pages)[which % len(self.pages)]
        self.index.delete_ref_doc(name)
        del self.pages[name]

    @precondition(lambda self: len(self.talks) < 3)
    @rule(mode=st.sampled_from(MODES), owner=st.sampled_from((None, *OWNERS)), another=st.booleans())
    def talk(self, mode: str, owner: str | None, another: bool) -> None:
        self.talks.append(Talk(mode, owner, another, start(self.index, mode, owner, another)))

    @precondition(lambda self: self.talks)
    @rule(
        which=st.integers(0, 2),
        message=st.sampled_from(MESSAGES),
        way=st.sampled_from(("chat", "stream", "achat", "astream")),
    )
    def ask(self, which: int, message: str, way: str) -> None:
        """Ask one, and ask the oracle."""
        talk = self.talks[which % len(self.talks)]
        fresh = FocusMemoryIndex(self.index.nodes, llm=FocusLLM(engine=engine(), max_tokens=3))
        expected = start(fresh, talk.mode, talk.owner, talk.another, talk.turns).chat(message)
        text, sources = say(talk.engine, message, way)
        assert text == str(expected).strip()
        assert [item.node_id for item in sources] == [item.node_id for item in expected.source_nodes]
        assert [item.score for item in sources] == pytest.approx(
            [item.score for item in expected.source_nodes], abs=1e-5
        )
        for item in sources:
            assert item.node.metadata["owner"] == self.pages[item.node.ref_doc_id].metadata["owner"]
            assert talk.owner in (None, item.node.metadata["owner"])
        if talk.another and talk.owner:
            assert not any(f"of {owner}, " in text for owner in OWNERS if owner != talk.owner and not talk.turns)
        turns = [*talk.turns, ("user", message), ("assistant", text)]
        talk.turns = kept(talk.engine)
        assert [(role, said.strip()) for role, said in talk.turns] == [(role, said.strip()) for role, said in turns]

    @precondition(lambda self: self.talks)
    @rule(which=st.integers(0, 2))
    def leave_a_stream(self, which: int) -> None:
        """Take the first piece and go; the turn is kept, whole."""
        talk = self.talks[which % len(self.talks)]
        found = talk.engine.stream_chat("who?")
        pieces = found.response_gen
        next(pieces, None)
        pieces.close()
        turns = kept(talk.engine)
        assert turns[:-2] == talk.turns
        assert [role for role, _ in turns[-2:]] == ["user", "assistant"]
        talk.turns = turns

    @precondition(lambda self: self.talks)
    @rule(which=st.integers(0, 2))
    def reset(self, which: int) -> None:
        talk = self.talks[which % len(self.talks)]
        talk.engine.reset()
        talk.turns.clear()

    @invariant()
    def histories_are_their_own(self) -> None:
        """No conversation has a turn of another's, and none is lost."""
        for talk in getattr(self, "talks", ()):
            assert kept(talk.engine) == talk.turns


Conversations.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
test_conversations = pytest.mark.slow(Conversations.TestCase)
