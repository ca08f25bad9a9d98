"""Let tenants and threads ask, change, stream and cancel in any order, beside a fresh model for every call.

Whatever caches, memories and chunk KV are shared between calls, an answer, its sources and its citations are those of
a model that was made for this call alone, and nothing of another tenant or thread is among them.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from langchain.agents.middleware import ModelRequest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document as Page
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda

from focus_core import Document
from focus_integrations.langchain import ChatFocusLLM, LongMemory, memory_tools
from focus_integrations.langchain.middleware import FocusMemoryMiddleware
from tests.langchain.conftest import tiny_engine

ENGINE = tiny_engine()
TENANTS = st.sampled_from(["a", "b"])
THREADS = st.sampled_from(["1", "1-2", None])
NAMES = st.sampled_from(["x", "y", "document-0"])
TEXTS = st.sampled_from(["the cat sat", "the dog ate the hat. " * 12, "mat", " "])
QUESTIONS = st.sampled_from(["who?", "where is the cat?", "the mat. " * 1200])
WAYS = st.sampled_from(["invoke", "ainvoke", "stream", "astream", "batch"])
SETTINGS: dict[str, Any] = {"max_tokens": 3, "citations": 9}


class Isolation(RuleBasedStateMachine):
    """One long-lived model with a cache, one agents' memory, and what they should know."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[Page] = []
        self.memory = ENGINE.remember([])
        self.chat = ChatFocusLLM(
            engine=ENGINE, documents=self.pages, memory=self.memory, cache=InMemoryCache(), **SETTINGS
        )
        self.notes = LongMemory(engine=ENGINE)
        self.middleware = FocusMemoryMiddleware(self.notes, keep_tokens=10)
        self.shared: dict[str, str] = {}
        self.turns: dict[str, dict[str, str]] = {"1": {}, "1-2": {}}

    # -- changes ------------------------------------------------------------------------------------------------

    @rule(name=NAMES, text=TEXTS, tenant=TENANTS)
    def put_page(self, name: str, text: str, tenant: str) -> None:
        """Add a page, or another under the same id."""
        self.pages.append(Page(page_content=text, id=name, metadata={"tenant": tenant, "title": f"{tenant} {name}"}))
        del self.pages[:-4]

    @rule(tenant=TENANTS)
    def give_pages_away(self, tenant: str) -> None:
        """Change metadata in place: all pages are another's now."""
        for page in self.pages:
            page.metadata.update(tenant=tenant, title=f"{tenant} {page.id}")

    @rule(name=NAMES, text=TEXTS, tenant=TENANTS)
    def put_into_memory(self, name: str, text: str, tenant: str) -> None:
        """Add a document to the live memory, replace it, or give it another owner."""
        if text.strip():
            self.memory.add([Document(name, text, {"tenant": tenant, "title": f"{tenant} memory {name}"})])

    @rule(name=NAMES)
    def remove_from_memory(self, name: str) -> None:
        """Remove a document from the live memory."""
        if name in self.memory:
            self.memory.remove([name])

    # -- calls --------------------------------------------------------------------------------------------------

    def fresh(self) -> ChatFocusLLM:
        """Return a model that has seen nothing."""
        memory = ENGINE.remember([copy.deepcopy(document) for document in self.memory.documents])
        return ChatFocusLLM(engine=ENGINE, documents=copy.deepcopy(self.pages), memory=memory, cache=False, **SETTINGS)

    @rule(tenant=TENANTS, question=QUESTIONS, way=WAYS, called=st.booleans(), brought=st.sampled_from([(), ("hat",)]))
    def ask(self, tenant: str, question: str, way: str, called: bool, brought: tuple[str, ...]) -> None:
        """Ask as a tenant: the answer and all that comes with it are a fresh model's, and the tenant's own."""
        if not any(page.page_content.strip() for page in self.pages):
            self.pages.append(Page(page_content="a page", id="p", metadata={"tenant": tenant, "title": f"{tenant} p"}))
        wanted: Any = (lambda document: document.metadata["tenant"] == tenant) if called else {"tenant": tenant}
        given = {"memory_filter": wanted, **({"documents": list(brought)} if brought else {})}
        found = _answer(self.chat, way, question, given)
        assert found == _answer(self.fresh(), "invoke", question, given)
        assert all(title[:1] == tenant or text in (*brought, question[: len(text)]) for title, text in found[2])

    @rule(tenant=TENANTS, asynchronous=st.booleans())
    def leave_a_stream(self, tenant: str, asynchronous: bool) -> None:
        """Stop listening after the first piece."""
        if not any(page.page_content.strip() for page in self.pages):
            return
        given: Any = {"memory_filter": {"tenant": tenant}, "documents": ["left"]}
        if not asynchronous:
            stream: Any = self.chat.stream("who?", **given)
            next(stream)
            stream.close()
            return

        async def leave() -> None:
            task = asyncio.create_task(self.chat.ainvoke("who?", **given))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())

    # -- agents -------------------------------------------------------------------------------------------------

    @rule(text=st.sampled_from(["a note", "another note"]))
    def note(self, text: str) -> None:
        """Keep a note for all."""
        self.shared[self.notes.remember(text)] = text

    @rule(thread=THREADS, number=st.integers(0, 2))
    def talk(self, thread: str | None, number: int) -> None:
        """Talk in a thread, so long that an old turn leaves: it is read there with the notes, and nothing else is."""
        said = f"secret {number} of {thread}. " * 6
        messages = [HumanMessage(said, id=f"{number}"), AIMessage("yes", id="y" * 3), HumanMessage("and?", id="z")]
        own = self.turns[thread] if thread is not None else {}
        own[f"turn {number}"] = f"human: {said}"
        expected = {*self.shared.values(), *own.values()}
        model = ChatFocusLLM(engine=ENGINE, holder=self.chat.holder, cache=self.chat.cache, **SETTINGS)
        request = self.in_thread(thread, lambda: self.middleware._moved(ModelRequest(model=model, messages=messages)))
        message = model.bind(**request.model_settings).invoke(request.messages)
        assert {source["document_id"] for source in message.response_metadata["sources"]} >= set(self.shared)
        read = {document.text for item in request.model_settings["documents"] for document in item.documents}
        assert read == expected
        assert {source["text"].strip()[:20] for source in message.response_metadata["sources"]} <= {
            text[at : at + 20].strip() for text in expected for at in range(len(text))
        }

    @rule(thread=THREADS)
    def use_tools(self, thread: str | None) -> None:
        """Recall finds notes and the thread's own turns; forget takes its own turn and no other's."""
        _, recall, forget = memory_tools(self.notes)
        call = {"type": "tool_call", "name": "recall", "args": {"query": "secret"}, "id": "1"}
        found = self.in_thread(thread, lambda: recall.invoke(call)).artifact
        own = self.turns[thread] if thread is not None else {}
        assert {one["text"] for one in found} <= {*self.shared.values(), *own.values()}
        for document in self.notes.documents:
            if document.metadata.get("thread") not in (None, thread):
                said = self.in_thread(thread, lambda id=document.id: forget.invoke({"id": id}))
                assert said.startswith("there is no note")

    def in_thread(self, thread: str | None, work: Any) -> Any:
        """Run as a graph would run it."""
        configurable = {} if thread is None else {"thread_id": thread}
        return RunnableLambda(lambda _: work()).invoke(None, {"configurable": configurable})

    @invariant()
    def nothing_is_lost(self) -> None:
        """The agents' memory holds the notes and the threads' turns, and nothing else."""
        expected = {*self.shared.values(), *(text for turns in self.turns.values() for text in turns.values())}
        assert {document.text for document in self.notes.documents} == expected


def _answer(chat: ChatFocusLLM, way: str, question: str, given: dict[str, Any]) -> tuple[str, set[Any], set[Any]]:
    if way == "stream":
        parts = list(chat.stream(question, **given))
        message: Any = sum(parts[1:], parts[0])
    elif way == "astream":

        async def collect() -> list[Any]:
            return [part async for part in chat.astream(question, **given)]

        parts = asyncio.run(collect())
        message = sum(parts[1:], parts[0])
    elif way == "batch":
        message = chat.batch([question, "other", question], **given)[2]
    elif way == "ainvoke":
        message = asyncio.run(chat.ainvoke(question, **given))
    else:
        message = chat.invoke(question, **given)
    facts = message.response_metadata
    sources = {(source["document_id"], source["start"], source["end"], source["text"]) for source in facts["sources"]}
    return message.text, sources, {(one["title"], one["cited_text"]) for one in facts["citations"]}


TestIsolation = pytest.mark.slow(Isolation.TestCase)
TestIsolation.settings = settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)
