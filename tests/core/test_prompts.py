"""Check what becomes of questions, conversations and documents of any length and kind."""

from __future__ import annotations

import pytest

from focus_core import Document
from focus_core.errors import (
    DocumentNotFoundError,
)
from focus_core.session.documents import to_documents
from tests.core.test_engine import DOCUMENTS


def test_scores_belong_to_their_documents_in_any_order(make_engine):
    """With shared positions each document's score == its score when the documents come in another order."""
    engine = make_engine(scale=0.5)
    documents = [Document(str(index), text) for index, text in enumerate(DOCUMENTS)]
    first = engine.answer("who?", engine.remember(documents), max_tokens=3)
    second = engine.answer("who?", engine.remember(documents[::-1]), max_tokens=3, chunks_per_batch=2)
    assert {item.document_id: item.score for item in first.evidence} == {
        item.document_id: pytest.approx(item.score, abs=1e-5) for item in second.evidence
    }
    assert len({round(item.score, 4) for item in first.evidence}) == 3


def test_a_long_prompt_splits_at_a_paragraph(make_engine):
    """Head + tail hold the whole prompt; the tail is within the dynamic prompt; a short prompt stays whole."""
    engine = make_engine()
    prompt = "the cat sat on the mat.\n\n" * 60 + "who ate the hat?"
    head, tail = engine.split_prompt(prompt)
    assert tail.endswith("who ate the hat?")
    assert prompt.replace("\n", "") == (head + tail).replace("\n", "")
    assert 0 < engine.count_tokens(tail) <= engine.config.prompt_length
    assert engine.split_prompt("who?") == ("", "who?")


@pytest.mark.parametrize("text", ["/nope", "contracts/", "./notes", "~/nope", "C:\\texts\\a", "a/b.txt", "nope.txt"])
def test_what_looks_like_a_path_must_be_there(text, make_engine):
    """A string alone that looks like a path and names nothing is an error; in a list it is a text."""
    engine = make_engine()
    with pytest.raises(DocumentNotFoundError, match=r"no file or folder at .*; check the path .a text is"):
        engine.remember(text)
    with pytest.raises(DocumentNotFoundError, match="no file or folder at"):
        to_documents(text)
    assert [document.text for document in engine.remember([text]).documents] == [text]
    assert [document.text for document in to_documents([text])] == [text]


def test_a_string_alone_is_a_path_where_it_names_one(make_engine, tmp_path, monkeypatch):
    """A folder and a file by name, ``~`` too; prose stays a text, slashes and dots in it too."""
    engine = make_engine()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("the cat sat")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("notes", "notes/", "notes/a.txt", str(tmp_path / "notes"), "~/notes"):
        assert [document.text for document in engine.remember(name).documents] == ["the cat sat"]
        assert [document.text for document in to_documents(name)] == ["the cat sat"]
    for text in ("the cat and/or the dog sat.", "Who ate the hat?", "hat", "It costs 3.50", "the cat\n/etc/hosts"):
        assert [document.text for document in engine.remember(text).documents] == [text]
