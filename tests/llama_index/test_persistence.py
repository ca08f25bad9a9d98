"""Check that an index changes like a table and outlives its process: kept beside its nodes, loaded anywhere."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from llama_index.core import Document

from focus_core.errors import ConfigError, StoreError
from focus_core.store.database import Store
from focus_integrations.llama_index import (
    FocusLLM,
    FocusMemoryIndex,
)
from tests.conftest import tiny_model
from tests.llama_index.test_index import (
    NAMES,
    encoded_chunks,
    index,  # noqa: F401
    logits,
    pages,
)


def test_changes_touch_nothing_else(index, monkeypatch):
    """insert and delete compute the new document only; what is left answers bit-equally."""
    before, fingerprint = logits(index), index.memory.fingerprint
    counts = encoded_chunks(monkeypatch)
    index.insert(pages("zebra")[0])
    added = sum(counts)
    assert 0 < added <= len(index.ref_doc_info["zebra"].node_ids)  # equal text is computed once
    assert not torch.equal(logits(index), before)
    index.delete_ref_doc("zebra")
    assert sum(counts) == added
    assert torch.equal(logits(index), before)
    assert index.memory.fingerprint == fingerprint
    assert index.docstore.get_document_hash("zebra") is None


def test_refresh_and_update_by_hash(index, monkeypatch):
    """Unchanged documents compute nothing; changed and new ones are read; a deleted one comes back."""
    counts = encoded_chunks(monkeypatch)
    changed = Document(text="the dog ran. " * 9, doc_id="dog", metadata={"about": "dog"})
    assert index.refresh_ref_docs([*pages("cat"), changed, *pages("zebra")]) == [False, True, True]
    assert 0 < sum(counts) < len(index.memory)
    held = {node.ref_doc_id: node for node in index.nodes}
    assert set(held) == {*NAMES, "zebra"}
    assert "ran" in held["dog"].text
    assert len(index.nodes) == len(index.memory)
    index.delete_ref_doc("cat")
    assert index.refresh_ref_docs(pages("cat")) == [True]
    index.update_ref_doc(Document(text="new", doc_id="cat"))
    assert [node.text for node in index.nodes if node.ref_doc_id == "cat"] == ["new"]


async def test_asynchronous_changes(index):
    """ainsert, arefresh_ref_docs and adelete_ref_doc do what their namesakes do."""
    before = index.memory.fingerprint
    await index.ainsert(pages("zebra")[0])
    assert "zebra" in index.ref_doc_info
    assert await index.arefresh_ref_docs(pages("zebra")) == [False]
    await index.adelete_ref_doc("zebra")
    assert index.memory.fingerprint == before


def test_a_stopped_persist_is_noticed(index, llm, tmp_path, monkeypatch):
    """Killed while chunk KV was written: refused; persisted again over the half-written folder: whole."""

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_all", killed)
        with pytest.raises(KeyboardInterrupt):
            index.persist(tmp_path)
    with pytest.raises(StoreError, match="was not written to its end"):
        FocusMemoryIndex.load(tmp_path, llm)
    index.persist(tmp_path)
    assert torch.equal(logits(FocusMemoryIndex.load(tmp_path, llm)), logits(index))


@pytest.mark.slow
def test_load_in_another_process(make_engine, tokenizer, tmp_path):
    """A saved base, an index persisted here, loaded and asked there: the same answer."""
    model = tiny_model("llama", window=1024)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "adapter": "untrained", "chunk_size": 64, "max_tokens": 6}
    index = FocusMemoryIndex.from_documents(pages(), llm=FocusLLM(**settings))
    index.persist(tmp_path / "index")
    expected = str(index.as_query_engine().query("who sat?"))
    code = f"""
from focus_integrations.llama_index import FocusLLM, FocusMemoryIndex
index = FocusMemoryIndex.load({str(tmp_path / "index")!r}, FocusLLM(**{settings!r}))
print(repr(str(index.as_query_engine().query("who sat?"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(expected)


def test_indexes_are_persisted_and_not_pickled(index):
    """One clear error for an index and for what stands on it; a shallow copy is the same index."""
    engines = (index.as_query_engine(), index.as_retriever(), index.as_chat_engine())
    for item in (index, *engines):
        for carry in (pickle.dumps, copy.deepcopy):
            with pytest.raises(ConfigError, match="persist it to a folder"):
                carry(item)
    assert str(copy.copy(index).as_query_engine().query("who?")) == str(index.as_query_engine().query("who?"))
