"""Check agent memory: standard tool and store suites, persistence, and agents that run end to end offline."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest
from langchain.agents import create_agent
from langchain_core.documents import Document as Page
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.stores import BaseStore
from langchain_core.tools import BaseTool, tool
from langchain_tests.integration_tests import BaseStoreAsyncTests, BaseStoreSyncTests, ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from focus_core.errors import ConfigError, StoreError
from focus_integrations.langchain import ChatFocusLLM, FocusDocumentStore, LongMemory, memory_tools
from focus_integrations.langchain.middleware import FocusMemoryMiddleware
from focus_integrations.langchain.store import FocusMemoryStore
from tests.langchain.conftest import ScriptedEngine, tiny_engine

ENGINE, SCRIPTED = tiny_engine(), tiny_engine(ScriptedEngine)
FACTS = {
    "lease": "The lease was signed by Ada. " * 9,
    "roof": "The roof is green. " * 9,
    "cat": "The cat is called Tom. " * 9,
}


def _memory(folder: Any = None) -> LongMemory:
    memory = LongMemory(folder, engine=ENGINE)
    for name, text in FACTS.items():
        memory.remember(text, name)
    return memory


# -- the standard suites ----------------------------------------------------------------------------------------


class _Tool:
    number = 0
    params: ClassVar[dict[str, Any]] = {}

    @property
    def tool_constructor(self) -> BaseTool:
        return memory_tools(_memory())[self.number]

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return self.params


class TestRememberUnit(_Tool, ToolsUnitTests):
    params: ClassVar[dict[str, Any]] = {"text": "the cat sat"}


class TestRemember(_Tool, ToolsIntegrationTests):
    params: ClassVar[dict[str, Any]] = {"text": "the cat sat"}


class TestRecallUnit(_Tool, ToolsUnitTests):
    number = 1
    params: ClassVar[dict[str, Any]] = {"query": "who signed?"}


class TestRecall(_Tool, ToolsIntegrationTests):
    number = 1
    params: ClassVar[dict[str, Any]] = {"query": "who signed?"}


class TestForgetUnit(_Tool, ToolsUnitTests):
    number = 2
    params: ClassVar[dict[str, Any]] = {"id": "roof"}


class TestForget(_Tool, ToolsIntegrationTests):
    number = 2
    params: ClassVar[dict[str, Any]] = {"id": "roof"}


PAGES = [Page(page_content=text, metadata={"source": name}, id=name) for name, text in FACTS.items()]


class TestDocumentStore(BaseStoreSyncTests[Page]):
    @pytest.fixture
    def kv_store(self) -> BaseStore[str, Page]:
        return FocusDocumentStore(LongMemory(engine=ENGINE))

    @pytest.fixture
    def three_values(self) -> tuple[Page, Page, Page]:
        return PAGES[0], PAGES[1], PAGES[2]


class TestDocumentStoreAsync(BaseStoreAsyncTests[Page]):
    @pytest.fixture
    async def kv_store(self) -> BaseStore[str, Page]:
        return FocusDocumentStore(LongMemory(engine=ENGINE))

    @pytest.fixture
    def three_values(self) -> tuple[Page, Page, Page]:
        return PAGES[0], PAGES[1], PAGES[2]


# -- long memory ------------------------------------------------------------------------------------------------


def test_memory_outlives_the_object(tmp_path):
    """What was remembered is there after loading, recalled with equal scores; what was forgotten is not."""
    memory = _memory(tmp_path)
    memory.forget(["roof", "nothing"])
    again = LongMemory(tmp_path, engine=ENGINE)
    assert [document.id for document in again.documents] == ["lease", "cat"]
    before, after = memory.recall("who signed?"), again.recall("who signed?")
    assert [(one.document.id, one.passage) for one in before] == [(one.document.id, one.passage) for one in after]
    assert [one.score for one in before] == pytest.approx([one.score for one in after], abs=1e-6)
    assert {one.document.id for one in again.recall("x", wanted=["cat"])} == {"cat"}
    other = tiny_engine(seed=5)
    with pytest.raises(StoreError, match="another model"):
        _ = LongMemory(tmp_path, engine=other).memory
    other.close()
    with pytest.raises(ConfigError, match="nothing to remember"):
        memory.remember(" ")
    assert LongMemory(engine=ENGINE).recall("x") == []


def test_the_tools_work_on_one_memory():
    """What remember keeps, recall finds with its id and text, and forget removes."""
    memory = LongMemory(engine=ENGINE)
    remember, recall, forget = memory_tools(memory)
    said = remember.invoke({"text": "Ada signed the lease."})
    key = said.removeprefix("remembered as ")
    message = recall.invoke({"type": "tool_call", "id": "1", "name": "recall", "args": {"query": "who?"}})
    assert isinstance(message, ToolMessage)
    assert message.content == f"[{key}] Ada signed the lease."
    assert message.artifact[0]["text"] == "Ada signed the lease."
    assert forget.invoke({"id": key}) == f"forgot {key}"
    assert "there is no note" in forget.invoke({"id": key})
    assert recall.invoke({"query": "who?"}) == "nothing was remembered"


# -- agents -----------------------------------------------------------------------------------------------------


@tool
def read_file(path: str) -> str:
    """Read file from disk."""
    return f"contents of {path}: " + "the secret is 42. " * 60


def _agent(memory: LongMemory, **settings: Any) -> Any:
    chat = ChatFocusLLM(engine=SCRIPTED, max_tokens=200)
    middleware = FocusMemoryMiddleware(memory, tools=False, **settings)
    return create_agent(chat, [read_file], middleware=[middleware], checkpointer=InMemorySaver())


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent_keeps_everything_and_says_little(asynchronous):
    """Old turns and large results are moved word for word, read by the model, and stay in the checkpoint."""
    memory = LongMemory(engine=SCRIPTED)
    agent = _agent(memory, keep_tokens=60, result_tokens=100)

    def ask(text: str, thread: str) -> list[Any]:
        state, config = {"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread}}
        if asynchronous:
            return asyncio.run(agent.ainvoke(state, config))["messages"]
        return agent.invoke(state, config)["messages"]

    messages = ask("read file 'a.txt'", "one")
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[2].content == read_file.invoke({"path": "a.txt"})
    result = next(document for document in memory.documents if document.id.startswith("result/one/"))
    assert result.text == messages[2].content
    sources = {source["document_id"] for source in messages[-1].response_metadata["sources"]}
    assert sources == {result.id}
    messages = ask("read file 'b.txt'", "one")
    assert len(messages) == 8
    everything = "\n".join(document.text for document in memory.documents)
    assert "read file 'a.txt'" in everything
    assert messages[3].content in everything
    other = ask("read file 'c.txt'", "two")[-1]
    read = {source["document_id"] for source in other.response_metadata["sources"]}
    assert all(name.startswith("result/two/") for name in read)


@pytest.mark.slow
def test_notes_are_read_everywhere_and_documents_besides():
    """A note of one thread is in another's memory; the model's own documents are read too; its filter holds threads."""
    memory = LongMemory(engine=SCRIPTED)
    memory.remember("Ada signed the lease.", "note")
    chat = ChatFocusLLM(engine=SCRIPTED, max_tokens=100, documents=["the mat"])
    bare = create_agent(chat, middleware=[FocusMemoryMiddleware(memory, tools=False)])
    last = bare.invoke({"messages": [HumanMessage("who?")]})["messages"][-1]
    assert {source["document_id"] for source in last.response_metadata["sources"]} == {"note", "document-0"}
    agent = create_agent(chat, middleware=[FocusMemoryMiddleware(memory)])
    state = agent.invoke({"messages": [HumanMessage("remember 'the roof is green'")]})
    assert state["messages"][2].content.startswith("remembered as note-")
    assert [document.text for document in memory.documents] == ["Ada signed the lease.", "the roof is green"]


def test_another_model_gets_what_is_recalled():
    """A model that reads no memory finds the best notes in its system message."""
    seen: list[Any] = []

    class Listening(GenericFakeChatModel):
        def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(messages)
            return super()._generate(messages, *args, **kwargs)

    memory = _memory()
    chat = Listening(messages=iter([AIMessage("yes")]))
    agent = create_agent(chat, system_prompt="be brief", middleware=[FocusMemoryMiddleware(memory, tools=False, k=1)])
    agent.invoke({"messages": [HumanMessage("who signed?")]})
    best = memory.recall("who signed?", 1)[0]
    assert seen[0][0].content == f"be brief\n\nFrom memory:\n- {best.passage.strip()}"


@pytest.mark.slow
def test_a_structured_agent():
    """create_agent with response_format ends in a valid value."""
    from pydantic import BaseModel

    class Weather(BaseModel):
        """Weather."""

        degrees: int

    agent = create_agent(ChatFocusLLM(engine=ENGINE, max_tokens=120), response_format=Weather)
    assert isinstance(agent.invoke({"messages": [HumanMessage("how warm?")]})["structured_response"], Weather)


# -- the langgraph store ----------------------------------------------------------------------------------------


def _filled(store: Any) -> Any:
    store.put(("users", "a"), "one", {"text": "Ada signed the lease.", "size": 3})
    store.put(("users", "b"), "two", {"text": "The roof is green.", "size": 5})
    store.put(("notes",), "three", {"text": "The cat is called Tom.", "size": 7, "deep": {"tag": "x"}})
    store.put(("users", "a"), "one", {"text": "Ada and Bob signed.", "size": 4})
    store.put(("users", "b"), "gone", {"text": "x"})
    store.delete(("users", "b"), "gone")
    return store


def test_the_store_does_what_langgraphs_own_does(tmp_path):
    """get, search with filters and pages, and namespaces equal InMemoryStore's, also after loading from disk."""
    own = _filled(InMemoryStore())
    _filled(FocusMemoryStore(LongMemory(tmp_path, engine=ENGINE)))
    store = FocusMemoryStore(LongMemory(tmp_path, engine=ENGINE))

    def facts(items: Any) -> set[Any]:
        return {(item.namespace, item.key, str(item.value)) for item in items}

    assert store.get(("users", "a"), "one").value == own.get(("users", "a"), "one").value
    assert store.get(("users", "a"), "none") is None
    item = store.get(("users", "a"), "one")
    assert item.updated_at > item.created_at
    for filters in (
        None,
        {"size": 5},
        {"size": {"$gt": 4}},
        {"size": {"$gte": 4, "$lt": 7}},
        {"deep": {"tag": "x"}},
        {"size": {"$ne": 5}},
    ):
        for prefix in ((), ("users",), ("users", "a"), ("nothing",)):
            assert facts(store.search(prefix, filter=filters)) == facts(own.search(prefix, filter=filters))
    assert len(store.search((), limit=2)) == 2
    assert len(store.search((), limit=2, offset=2)) == 1
    for arguments in ({}, {"prefix": ("users",)}, {"suffix": ("b",)}, {"prefix": ("*", "a")}, {"max_depth": 1}):
        assert store.list_namespaces(**arguments) == own.list_namespaces(**arguments)
    with pytest.raises(ConfigError, match=r"\$near"):
        store.search((), filter={"size": {"$near": 3}})


def test_items_of_the_store_belong_to_their_namespace():
    """Over one memory: no conversation sees them; ids with half an emoji stay apart."""
    memory = LongMemory(engine=tiny_engine())
    store = FocusMemoryStore(memory)
    store.put(("users", "anna"), "pin", {"pin": "the cat sat"})
    for half in ("\ud83d", "\ud83e"):
        store.put((half,), half, {"text": half.encode("utf-8", "backslashreplace").decode()})
    assert [store.get((half,), half).value["text"] for half in ("\ud83d", "\ud83e")] == ["\\ud83d", "\\ud83e"]
    recall = memory_tools(memory)[1]
    assert recall.invoke({"query": "pin?"}, {"configurable": {"thread_id": "ben"}}) == "nothing was remembered"
    forget = memory_tools(memory)[2]
    assert "there is no note" in forget.invoke({"id": memory.documents[0].id})


async def test_searching_ranks_by_attention():
    """A query orders items by the scores of recall, within namespace and filter; async does not differ."""
    store = _filled(FocusMemoryStore(LongMemory(engine=ENGINE)))
    found = store.search((), query="who signed?")
    assert len(found) == 3
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)
    expected = [one.document.metadata["langgraph_item"]["key"] for one in store.memory.recall("who signed?")]
    assert [item.key for item in found] == expected
    assert {item.key for item in store.search(("users",), query="who signed?")} == {"one", "two"}
    assert [item.key for item in await store.asearch((), query="who signed?")] == expected


def test_filters_of_the_store_compare_only_what_can_be_compared():
    """A text is neither above nor below a number, and a value that contains itself is refused with one error."""
    store = _filled(FocusMemoryStore(LongMemory(engine=ENGINE)))
    store.put(("users", "a"), "text", {"size": "large"})
    store.put(("users", "a"), "list", {"size": [5]})
    assert {item.key for item in store.search((), filter={"size": {"$gte": 5}})} == {"two", "three"}
    assert [item.key for item in store.search((), filter={"size": {"$gt": "big"}})] == ["text"]
    assert [item.key for item in store.search((), filter={"size": {"$lt": None}})] == []
    circle: dict[str, Any] = {}
    circle["self"] = circle
    with pytest.raises(ConfigError, match="cannot be kept"):
        store.put(("users", "a"), "circle", circle)
