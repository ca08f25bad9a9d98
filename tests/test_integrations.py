"""Check FocusLLM in LangChain chains and LlamaIndex query engines, on a tiny model."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from focus_core import Document
from focus_core.errors import ConfigError
from focus_core.session import engines

LONG = "the cat sat on the mat.\n\n" * 80 + "who ate the hat?"


@pytest.mark.slow
def test_frameworks_are_imported_nowhere_else():
    """The engine, the CLI and the shared part import without LangChain and LlamaIndex."""
    code = (
        "import sys; import focus_core, focus_core.cli, focus_core.bench, focus_core.session.engines; "
        "assert not [m for m in sys.modules if m.startswith(('langchain', 'llama_index'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_langchain_chain_streams_batches_and_cites(make_engine, tmp_path):
    """prompt | llm | parser over documents: invoke == joined stream == batch == ainvoke; sources in the result."""
    from langchain_core.documents import Document as Page
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate

    from focus_integrations.langchain import FocusLLM

    (tmp_path / "c.txt").write_text("the mat. " * 20)
    pages = [
        Page(page_content="the dog ate the hat. " * 9, metadata={"source": "page"}),
        tmp_path / "c.txt",
        "mat hat cat",
    ]
    llm = FocusLLM(engine=make_engine(), documents=pages, max_tokens=6)
    chain = PromptTemplate.from_template("who {verb}?") | llm | StrOutputParser()
    expected = chain.invoke({"verb": "ate"})
    assert "".join(chain.stream({"verb": "ate"})).strip() == expected
    assert chain.batch([{"verb": "ate"}, {"verb": "sat"}])[0] == expected
    assert asyncio.run(chain.ainvoke({"verb": "ate"})) == expected
    info = llm.generate(["who ate?"]).generations[0][0].generation_info
    assert {source["document_id"] for source in info["sources"]} == {"page", str(tmp_path / "c.txt"), "document-2"}
    assert info["usage"]["memory_tokens"] > 60
    assert llm.generate(["who ate?"]).llm_output["token_usage"]["completion_tokens"] >= 1


def test_langchain_reads_prompts_longer_than_the_window(make_engine):
    """A prompt of several windows is answered; its head became memory; documents of one call do not stay."""
    from focus_integrations.langchain import FocusLLM

    llm = FocusLLM(engine=make_engine(), max_tokens=4)
    assert llm.get_num_tokens(LONG) > 256
    info = llm.generate([LONG]).generations[0][0].generation_info
    assert info["sources"][0]["document_id"] == "prompt"
    once = llm.bind(documents=["the hat " * 20])
    assert isinstance(once.invoke("who?"), str)
    assert llm.generate(["who?"]).generations[0][0].generation_info["sources"] == []


def test_langchain_cache_keys_hold_the_corpus(make_engine):
    """Equal prompts over different documents have different cache keys; equal ones the same."""
    from langchain_core.caches import InMemoryCache

    from focus_integrations.langchain import FocusLLM

    engine = make_engine()
    keys = [
        str(dict(FocusLLM(engine=engine, cache=InMemoryCache(), documents=[Document("a", text)])._identifying_params))
        for text in ("the cat", "the dog", "the cat")
    ]
    assert keys[0] == keys[2] != keys[1]


def test_langchain_stop_seed_and_cancel(make_engine):
    """stop ends the text in invoke and stream; seeds repeat; an abandoned stream frees the engine."""
    from focus_integrations.langchain import FocusLLM

    llm = FocusLLM(engine=make_engine(), documents=["the cat sat. " * 9], max_tokens=12, temperature=1.0, seed=5)
    text = llm.invoke("who?")
    assert text == llm.invoke("who?") != llm.invoke("who?", seed=6)
    stop = text[3:5]
    assert stop not in llm.invoke("who?", stop=[stop])
    assert stop not in "".join(llm.stream("who?", stop=[stop]))
    stream = llm.stream("who?", max_tokens=200)
    next(stream)
    stream.close()
    assert llm.invoke("who?") == text


def test_engines_are_shared_and_loaded_once(monkeypatch):
    """Equal settings give the same engine; the loader runs once for each."""
    loaded = []
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(
        engines.FocusEngine, "from_pretrained", classmethod(lambda cls, *a, **k: loaded.append(a) or object())
    )
    one = engines.shared_engine("x")
    assert one is engines.shared_engine("x")
    assert one is not engines.shared_engine("y")
    assert len(loaded) == 2


def test_bad_documents_are_named():
    """A document that is none says which type it was."""
    with pytest.raises(ConfigError, match="got int"):
        engines.to_documents([3])


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_the_readmes_blocks_run(framework, make_engine, tmp_path, monkeypatch):
    """The README's framework blocks, word for word, on a tiny engine and a folder of contracts."""
    import importlib

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", readme, re.S)
        if f"focus_integrations.{framework}" in block
    ]
    assert len(blocks) == 1
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "lease.txt").write_text("the cat sat on the mat. " * 40)
    monkeypatch.chdir(tmp_path)
    engine = make_engine(window=512, chunk_size=320)
    module = importlib.import_module(f"focus_integrations.{framework}.llm")
    monkeypatch.setattr(engines, "_engines", {(None, None, None, None): engine})
    monkeypatch.setattr(module.FocusLLM.model_fields["max_tokens"], "default", 8)
    exec(compile(blocks[0], "README.md", "exec"), {"any_length_of_text": LONG})
