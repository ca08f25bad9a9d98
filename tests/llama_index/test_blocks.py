"""Check what messages carry: attachments and citations, tool calls as models write them, turns that are evicted."""

from __future__ import annotations

import logging
import re

import pytest
from llama_index.core.base.llms.types import (
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import Document as Page
from llama_index.core.schema import TextNode

from focus_core import Document
from focus_core.answers import AnswerStream
from focus_core.model.constraints import regex
from focus_integrations.llama_index import FocusLLM, FocusMemoryBlock, FocusMemoryIndex
from tests.conftest import tiny_model

from .conformance import ADD, HELLO

OLD, NEW = "the cat sat on the mat. " * 6, "the dog ate the hat. " * 6
LONG = "the cat sat on the mat.\n\n" * 200 + "who ate the hat?"


@pytest.fixture
def engine(make_engine):
    return make_engine(model=tiny_model("llama", window=1024), window=1024, chunk_size=64)


@pytest.fixture
def llm(engine):
    return FocusLLM(engine=engine, max_tokens=12)


@pytest.fixture
def write(engine, monkeypatch):
    """Make the engine write a text, token by token, whatever it is asked."""
    plain = engine.stream_ids

    def script(text: str) -> None:
        only = regex(re.escape(text).replace("\\ ", " "))
        options = {"constraint": only, "max_tokens": 400}
        monkeypatch.setattr(engine, "stream_ids", lambda *a, **k: plain(*a, **{**k, **options}))

    return script


def asking(*blocks):
    return [ChatMessage(role="user", blocks=[*blocks, TextBlock(text="who sat?")])]


def cited(response) -> list[CitationBlock]:
    return [block for block in response.message.blocks if isinstance(block, CitationBlock)]


# -- attachments ------------------------------------------------------------------------------------------------


def test_attachments_of_one_name_are_all_read_and_cited(llm):
    """Citables with one source, untitled documents: each is read, and its citation is of its own text and title."""
    one = CitableBlock(title="Old lease", source="lease.pdf", content=[TextBlock(text=OLD)])
    two = CitableBlock(title="New lease", source="lease.pdf", content=[TextBlock(text=NEW)])
    found = llm.chat(asking(one, two))
    assert len(found.raw["focus"]["sources"]) == 2
    assert {(block.title, block.source) for block in cited(found)} == {
        ("Old lease", "lease.pdf"),
        ("New lease", "lease.pdf"),
    }
    for block in cited(found):
        text, place = {"Old lease": OLD, "New lease": NEW}[block.title], block.additional_location_info
        assert text[place["source_start"] : place["source_end"]] == block.cited_content.text
    files = llm.chat(asking(DocumentBlock(data=OLD.encode()), DocumentBlock(data=NEW.encode())))
    assert {block.cited_content.text.split()[1] for block in cited(files)} == {"cat", "dog"}


def test_an_attachment_named_like_a_document_in_memory(llm, engine):
    """Both are read, and the citation quotes the attachment: beside a memory, own documents, a call's documents."""
    attached = CitableBlock(title="Lease", source="lease.pdf", content=[TextBlock(text=NEW)])
    kept = Document("lease.pdf", OLD)
    models = [
        (llm.with_memory(engine.remember([kept])), {}),
        (FocusLLM(engine=engine, max_tokens=4, documents=[kept]), {}),
        (llm, {"documents": [kept]}),
    ]
    for model, options in models:
        found = model.chat(asking(attached), **options)
        assert len(found.raw["focus"]["sources"]) == 2
        assert cited(found)
        for block in cited(found):
            place = block.additional_location_info
            assert (block.source, block.title) == ("lease.pdf", "Lease")
            assert NEW[place["source_start"] : place["source_end"]] == block.cited_content.text


def test_blanks_are_left_out(llm, caplog):
    """A blank attachment, alone or beside others, and a blank document of a call."""
    blank = CitableBlock(title="Empty", source="empty.pdf", content=[TextBlock(text=" ")])
    assert [item["document_id"] for item in llm.chat(asking(blank)).raw["focus"]["sources"]] == []
    assert "'empty.pdf' holds no text and is left out" in caplog.text
    both = llm.chat(asking(blank, DocumentBlock(data=OLD.encode(), title="full"))).raw
    assert [item["document_id"] for item in both["focus"]["sources"]] == ["full"]
    raw = llm.complete("who?", documents=[Page(text=OLD, doc_id="a"), Page(text=" ")]).raw
    assert [item["document_id"] for item in raw["focus"]["sources"]] == ["a"]


# -- turns that leave the window ----------------------------------------------------------------------------------


async def test_a_turn_is_kept_with_what_it_carries(llm, caplog):
    """Attachments word for word; what is no text is skipped with a notice, and the rest of the turn is kept."""
    block = FocusMemoryBlock(llm=llm)
    turn = ChatMessage(
        role="user",
        blocks=[
            TextBlock(text="see the file"),
            DocumentBlock(data=OLD.encode(), title="lease"),
            CitableBlock(title="Note", source="note", content=[TextBlock(text=NEW)]),
            ImageBlock(url="http://localhost/cat.png"),
            DocumentBlock(data=b"\x7fELF\0\0", title="tool.bin"),
        ],
    )
    with caplog.at_level(logging.WARNING):
        await block.aput([turn], from_short_term_memory=True, session_id="anna")
    (document,) = block.session("anna").documents
    assert document.text.startswith("user: see the file")
    assert OLD in document.text
    assert NEW in document.text
    assert "ImageBlock" in caplog.text
    assert "tool.bin" in caplog.text
    only = ChatMessage(role="user", blocks=[ImageBlock(url="http://localhost/cat.png")])
    await block.aput([only], from_short_term_memory=True, session_id="anna")
    assert len(block.session("anna").documents) == 1
    asked = await block.aget([turn, only], session_id="anna")
    assert asked == ""


async def test_questions_above_the_window_ask_its_tail(llm):
    """A retriever and a memory block, sync and async; what they find is what the tail alone finds."""
    index = FocusMemoryIndex([TextNode(text=OLD, id_="a"), TextNode(text=NEW, id_="b")], llm=llm)
    retriever = index.as_retriever(similarity_top_k=2)
    tail = llm.engine.split_prompt(LONG)[1]
    expected = [(item.node_id, item.score) for item in retriever.retrieve(tail)]
    assert len(expected) == 2
    assert [(item.node_id, item.score) for item in retriever.retrieve(LONG)] == expected
    assert [(item.node_id, item.score) for item in await retriever.aretrieve(LONG)] == expected
    block = FocusMemoryBlock(llm=llm, inject_top_k=1)
    block.remember("the dog ate the hat", "anna")
    question = ChatMessage(role="user", content=LONG)
    assert "dog" in await block.aget([question], session_id="anna")


# -- tool calls -------------------------------------------------------------------------------------------------


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": true, "b": true}}\n</tool_call>'


@pytest.mark.slow
def test_equal_requests_have_calls_of_their_own(llm, write):
    """Ids differ between requests and within one; the parts of a stream agree on theirs."""
    write(CALL + "\n" + CALL)
    responses = [llm.chat_with_tools([ADD], "add", allow_parallel_tool_calls=True) for _ in range(2)]
    ids = [call.tool_id for response in responses for call in llm.get_tool_calls_from_response(response)]
    assert len(set(ids)) == len(ids) == 4
    parts = list(llm.stream_chat_with_tools([ADD], "add", allow_parallel_tool_calls=True))
    streamed = [
        [call.tool_call_id for call in part.message.blocks if isinstance(call, ToolCallBlock)] for part in parts
    ]
    assert len({tuple(found) for found in streamed if len(found) == 2}) == 1
    assert not {*streamed[-1]} & {*ids}


@pytest.mark.slow
@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>\n{"name": "ad\\d", "arguments": {"a": true}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": "\\q"}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": "x\ny"}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": tr',
        '<tool_call>\n{"name": "add", "arguments": "x"}\n</tool_call>',
        "<tool_call>\nadd(a=true)\n</tool_call>",
    ],
)
def test_a_call_that_is_none_comes_back_as_text(llm, write, written):
    """Bad escapes, raw newlines, an end in the middle: every character is there, streamed or not, and no call."""
    write("so: " + written)
    whole = llm.chat_with_tools([ADD], "add", tool_required=False)
    assert not [block for block in whole.message.blocks if isinstance(block, ToolCallBlock)]
    assert re.sub(r"\s", "", whole.message.content) == re.sub(r"\s", "", "so: " + written)
    parts = list(llm.stream_chat_with_tools([ADD], "add"))
    assert "".join(part.delta for part in parts) == parts[-1].message.content == whole.message.content


def test_deeply_nested_arguments_come_back_as_text(llm, engine, monkeypatch):
    """No RecursionError from the JSON parser."""
    deep = '<tool_call>\n{"name": "add", "arguments": {"a": ' + "[" * 3000 + "]" * 3000 + "}}\n</tool_call>"
    plain = AnswerStream.__iter__
    monkeypatch.setattr(AnswerStream, "__iter__", lambda stream: (list(plain(stream)), iter([deep]))[1])
    found = llm.chat_with_tools([ADD], "add")
    assert "[[[[" in found.message.content
    assert not [block for block in found.message.blocks if isinstance(block, ToolCallBlock)]


@pytest.mark.slow
def test_no_call_is_read_where_none_is_wanted(llm, write):
    """tool_choice="none": the text that looks like a call stays text."""
    write(CALL)
    (block,) = llm.chat_with_tools([ADD], "add", tool_choice="none").message.blocks
    assert block.text == CALL
    (block,) = llm.chat(HELLO, tools=[ADD.metadata.to_openai_tool()], tool_choice="none").message.blocks
    assert block.text == CALL


def test_a_history_with_a_call_that_does_not_parse(llm):
    """Another model's call in the history, with arguments that are no JSON: read as it stands."""
    history = [
        ChatMessage(role="user", content="add"),
        ChatMessage(
            role="assistant", blocks=[ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs='{"a": tr')]
        ),
        ChatMessage(role="tool", content="error", additional_kwargs={"tool_call_id": "1"}),
    ]
    assert llm.chat([*history, *HELLO]).message.content


def test_calls_in_older_histories_are_read(llm):
    """Calls that stand in additional_kwargs, in the form of OpenAI's API, as chat stores of other models hold them."""
    written = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

    def after(extra):
        history = [
            ChatMessage(role="user", content="add"),
            ChatMessage(role="assistant", content=None, additional_kwargs=extra),
            ChatMessage(role="tool", content="2", additional_kwargs={"tool_call_id": "1"}),
        ]
        return llm.chat([*history, *HELLO])

    block = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 1})
    same = [
        ChatMessage(role="user", content="add"),
        ChatMessage(role="assistant", blocks=[block]),
        ChatMessage(role="tool", content="2", additional_kwargs={"tool_call_id": "1"}),
    ]
    found = after({"tool_calls": [written]})
    assert found.raw["usage"] == llm.chat([*same, *HELLO]).raw["usage"] != after({}).raw["usage"]
