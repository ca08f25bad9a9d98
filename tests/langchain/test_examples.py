"""Run every LangChain example, word for word, on a tiny engine in place of the default one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from focus_core.session import engines
from focus_integrations.langchain import text_splitter
from tests.conftest import byte_level_tokenizer
from tests.langchain.conftest import tiny_engine

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(chunk_size=256)
    monkeypatch.setattr(engines, "_engines", {(None, None, None, None): engine})
    monkeypatch.setattr(text_splitter, "load_tokenizer", lambda name: byte_level_tokenizer())


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pydantic looks names up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_chain_over_a_folder(tmp_path, capsys):
    """The answer is streamed and three passages of the folder are named."""
    (tmp_path / "lease.txt").write_text("The lease was signed by Ada. " * 90)
    _load("langchain_chain").main(str(tmp_path), "Who signed?")
    lines = capsys.readouterr().out.rstrip().split("\n")
    assert sum("lease.txt" in line for line in lines) == 3


@pytest.mark.slow
def test_chat_with_citations(capsys):
    """Two questions, two cited answers; the second reads what the first computed."""
    module = _load("langchain_chat")
    talk = module.main()
    assert [type(message) for message in talk[1::2]] == [AIMessage, AIMessage]
    said = capsys.readouterr().out
    assert said.count("kept from before") == 2
    assert "memory tokens: 0 read now" in said
    assert any(f"[{name}]" in said for name in module.PAGES)


@pytest.mark.slow
def test_agent_with_long_memory(tmp_path, capsys):
    """What left the conversation is on disk, word for word."""
    module = _load("langchain_agent")
    memory = module.main(tmp_path)
    everything = "\n".join(document.text for document in memory.documents)
    assert module.SAID[0] in everything
    assert module.SAID[1] in everything
    assert capsys.readouterr().out.count("%") >= 2


@pytest.mark.slow
def test_compare(capsys):
    """Both chains answer every question."""
    module = _load("langchain_compare")
    assert len(module.main()) == len(module.QUESTIONS)
    assert "all pages in memory" in capsys.readouterr().out
