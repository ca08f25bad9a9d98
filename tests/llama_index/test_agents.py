"""Run LlamaIndex's agents end to end on a tiny model, with memories that outlive the chat window.

A random model cannot choose a tool or write ReAct's format, so where the order of steps matters, each answer is held to
a script by a grammar: the engine still generates it token by token, reads its memory, and its output is parsed.
"""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
from llama_index.core import Document
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import BaseMemoryBlock, ChatMemoryBuffer, Memory
from llama_index.core.tools import FunctionTool

from focus_core.errors import ConfigError, StoreError
from focus_core.model.constraints import regex
from focus_integrations.llama_index import FocusLLM, FocusMemoryBlock, FocusMemoryIndex, index_tool, memory_tools
from tests.conftest import tiny_model

pytestmark = [  # LlamaIndex's own: workflows look at every attribute of an agent
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]


@pytest.fixture
def engine(make_engine):
    return make_engine(model=tiny_model("llama", window=4096), window=4096, chunk_size=64, prompt_length=128)


@pytest.fixture
def llm(engine):
    return FocusLLM(engine=engine, max_tokens=200)


@pytest.fixture
def script(engine, monkeypatch):
    """Make the engine's next answers these texts, generated under a grammar; note how many chunks each one read."""
    plain = engine.stream_ids
    answers: list[str] = []
    chunks: list[int] = []

    def stream_ids(local, memory=None, **options):
        chunks.append(len(memory) if memory is not None else 0)
        if answers:
            options |= {"constraint": regex(re.escape(answers.pop(0)).replace("\\ ", " ")), "max_tokens": 400}
        return plain(local, memory, **options)

    monkeypatch.setattr(engine, "stream_ids", stream_ids)

    def write(*texts: str) -> list[int]:
        answers.extend(texts)
        return chunks

    return write


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def buffer() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


@pytest.fixture
async def long_memory():
    """Make LlamaIndex memories of 60 tokens; their database is closed afterwards."""
    made: list[Memory] = []

    def make(block: FocusMemoryBlock, session_id: str, **options) -> Memory:
        memory = Memory.from_defaults(
            session_id=session_id, token_limit=60, token_flush_size=20, memory_blocks=[block], **options
        )
        made.append(memory)
        return memory

    yield make
    for memory in made:
        if memory.sql_store._async_engine is not None:
            await memory.sql_store._async_engine.dispose()


# -- agents -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent_calls_and_answers(llm, script, streaming):
    """A call, its result, an answer; the stream shows the call when it is whole."""
    script(call("add", a=3, b=4), "the sum is 7")
    agent = FunctionAgent(tools=[add], llm=llm, streaming=streaming)
    handler = agent.run("what is 3 + 4?", memory=buffer())
    results, streamed = [], []
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            results.append((event.tool_name, event.tool_kwargs, event.tool_output.content))
        if isinstance(event, AgentStream):
            streamed.append(event)
    assert str(await handler) == "the sum is 7"
    assert results == [("add", {"a": 3, "b": 4}, "7")]
    if streaming:
        assert any(event.tool_calls for event in streamed)
        assert streamed[-1].response == "the sum is 7"


@pytest.mark.slow
async def test_function_agent_by_constraint_alone(llm):
    """Unscripted: random weights, held to the first call by the grammar of the tool's schema."""

    def pick(colour: bool) -> str:
        """Pick a colour."""
        return "red" if colour else "blue"

    agent = FunctionAgent(tools=[pick], llm=llm, initial_tool_choice="pick")
    response = await agent.run("the cat", memory=buffer())
    assert response.tool_calls[0].tool_name == "pick"
    assert response.tool_calls[0].tool_output.content in ("red", "blue")
    assert response.response.content


@pytest.mark.slow
async def test_react_agent_thinks_acts_and_answers(llm, script):
    """ReAct's text format, over two steps."""
    script(
        'Thought: I need to add.\nAction: add\nAction Input: {"a": 3, "b": 4}',
        "Thought: I can answer.\nAnswer: it is 7",
    )
    response = await ReActAgent(tools=[add], llm=llm).run("what is 3 + 4?", memory=buffer())
    assert str(response) == "it is 7"
    assert response.tool_calls[0].tool_output.content == "7"


@pytest.mark.slow
async def test_agent_workflow_hands_over(llm, script):
    """One agent hands over to another, which calls its own tool."""
    script(
        call("handoff", to_agent="adder", reason="numbers"),
        call("add", a=1, b=2),
        "three",
    )
    greeter = FunctionAgent(
        name="greeter",
        description="Greets.",
        llm=llm,
        tools=[FunctionTool.from_defaults(lambda: "hi", name="greet")],
        can_handoff_to=["adder"],
    )
    adder = FunctionAgent(name="adder", description="Adds.", llm=llm, tools=[add])
    workflow = AgentWorkflow(agents=[greeter, adder], root_agent="greeter")
    response = await workflow.run("1 + 2?", memory=buffer())
    assert str(response) == "three"
    assert response.current_agent_name == "adder"
    single = AgentWorkflow.from_tools_or_functions([add], llm=llm)
    assert isinstance(next(iter(single.agents.values())), FunctionAgent)


@pytest.mark.slow
async def test_an_agent_asks_an_index(llm, script):
    """The tool reads every node; its answer comes back to the agent."""
    pages = [Document(text=f"the {name} sat on the mat. " * 12, doc_id=name) for name in ("cat", "dog")]
    index = FocusMemoryIndex.from_documents(pages, llm=llm)
    chunks = script(call("ask_documents", input="who sat?"), "the cat", "it was the cat")
    agent = FunctionAgent(tools=[index_tool(index, max_tokens=8)], llm=llm)
    response = await agent.run("who sat on the mat?", memory=buffer())
    assert str(response) == "it was the cat"
    assert response.tool_calls[0].tool_output.content == "the cat"
    assert chunks == [0, len(index.memory), 0]
    assert len(response.tool_calls[0].tool_output.raw_output.source_nodes) == len(index.nodes)


# -- long memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_evicted_turns_become_memory(llm, script, long_memory):
    """Turns that leave the chat window are read as chunks, word for word; the prompt has no trace of the block."""
    block = FocusMemoryBlock(llm=llm)
    assert BaseMemoryBlock.__name__ in [base.__name__ for base in type(block).__mro__]
    memory = long_memory(block, "anna")
    agent = FunctionAgent(tools=[add], llm=block.reader("anna"), system_prompt="the hat")
    chunks = script(*(f"answer {number}" for number in range(6)))
    for number in range(6):
        response = await agent.run(f"the cat {number} sat on the mat and the dog {number} ate the hat", memory=memory)
        assert str(response) == f"answer {number}"
    kept = "\n".join(document.text for document in block.session("anna").memory.documents)
    present = "\n".join(str(message) for message in await memory.aget())
    assert chunks[0] == 0 < chunks[-1] <= len(block.session("anna").memory)
    for number in range(6):
        turn = f"the cat {number} sat on the mat and the dog {number} ate the hat"
        assert (f"user: {turn}" in kept) != (turn in present)
    assert "<memory>" not in present
    assert {document.metadata["session_id"] for document in block.session("anna").memory.documents} == {"anna"}


async def test_sessions_are_apart(llm, long_memory):
    """What one session evicts, another cannot read."""
    block = FocusMemoryBlock(llm=llm)
    for session in ("anna", "ben"):
        memory = long_memory(block, session)
        for number in range(4):
            await memory.aput(ChatMessage(role="user", content=f"{session} likes the cat {number} " * 3))
            await memory.aput(ChatMessage(role="assistant", content="the mat " * 6))
    for session, other in (("anna", "ben"), ("ben", "anna")):
        text = "\n".join(document.text for document in block.session(session).memory.documents)
        assert session in text
        assert other not in text
    raw = block.reader("anna", max_tokens=3).complete("who?").raw
    assert raw["focus"]["chunks"] == len(block.session("anna").memory) > 0
    assert block.reader("nobody", max_tokens=3).complete("who?").raw["focus"]["chunks"] == 0


async def test_passages_for_models_that_cannot_read_memory(llm, long_memory):
    """With inject_top_k the best passages stand in the prompt, where LlamaIndex puts its own blocks."""
    block = FocusMemoryBlock(llm=llm, inject_top_k=1)
    block.remember("the dog ate the hat", "anna")
    memory = long_memory(block, "anna")
    await memory.aput(ChatMessage(role="user", content="who ate?"))
    first = (await memory.aget())[0]
    assert first.role == "system"
    assert "<LongMemory>" in first.content
    assert "the dog ate the hat" in first.content


@pytest.mark.slow
async def test_remember_recall_forget_as_tools(llm, script):
    """An agent keeps a fact, finds it in another conversation, and forgets it; bad ids are answered, not raised."""
    block = FocusMemoryBlock(llm=llm)
    agent = FunctionAgent(tools=memory_tools(block, "anna"), llm=llm)
    script(call("remember", text="the lease ends in May"), "kept")
    await agent.run("remember this", memory=buffer())
    assert [document.text for document in block.session("anna").memory.documents] == ["the lease ends in May"]
    script(call("recall", question="when?"), "x", "May")
    response = await agent.run("when does it end?", memory=buffer())
    assert response.tool_calls[0].tool_output.content.endswith("] the lease ends in May")
    (name,) = (document.id for document in block.session("anna").documents)
    remember, recall, forget = memory_tools(block, "anna")
    assert "nothing is remembered under 'memory-9'" in (await forget.acall("memory-9")).content
    assert (await forget.acall(name)).content == f"Forgot {name}."
    assert (await recall.acall("when?")).content == "Nothing is remembered."
    again = [(await remember.acall("again")).content for _ in range(2)]
    assert again[0] == again[1] == block.session("anna").documents[0].id
    with pytest.raises(ConfigError, match="nothing to remember"):
        block.remember(" ", "anna")


@pytest.mark.filterwarnings("ignore:.*half a surrogate pair:UserWarning")
def test_a_block_goes_where_its_folder_is(make_engine, tmp_path, monkeypatch):
    """Pickled, it reads its sessions out of the folder; without one it says so; a copy of an agent shares it."""
    from focus_integrations.llama_index import llm as module

    engine = make_engine()
    monkeypatch.setattr(module, "shared_engine", lambda *given: engine)
    block = FocusMemoryBlock(llm=FocusLLM(), folder=str(tmp_path))
    block.remember("the cat sat \ud83d.", "half \ud83d")
    there = pickle.loads(pickle.dumps(block))
    assert [item.document.text for item in there.recall("who?", "half \ud83d")] == ["the cat sat \ufffd."]
    there.remember("the dog ate.", "half \ud83d")
    assert len(block.recall("who?", "half \ud83d")) == 2
    alone = FocusMemoryBlock(llm=FocusLLM())
    assert copy.deepcopy(alone) is alone
    with pytest.raises(ConfigError, match="cannot be pickled; give a folder"):
        pickle.dumps(alone)


def test_a_block_persists(llm, make_engine, tmp_path):
    """Sessions are there for another block, with equal scores; another model is refused."""
    block = FocusMemoryBlock(llm=llm, folder=str(tmp_path))
    for text in ("the cat sat. " * 9, "the dog ate. " * 9):
        block.remember(text, "anna")
    block.remember("the hat", "ben")
    again = FocusMemoryBlock(llm=llm, folder=str(tmp_path))
    for session in ("anna", "ben"):
        found = [(item.document.text, item.passage) for item in again.recall("who?", session)]
        assert found == [(item.document.text, item.passage) for item in block.recall("who?", session)] != []
    assert again.recall("who?", "nobody") == []
    with pytest.raises(StoreError, match="made by another model"):
        FocusMemoryBlock(llm=FocusLLM(engine=make_engine("qwen2")), folder=str(tmp_path)).recall("who?", "anna")
