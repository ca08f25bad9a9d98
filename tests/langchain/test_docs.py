"""Run the blocks of docs/langchain.md, word for word, and check that its table names every parameter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from focus_core.session import engines
from focus_integrations.langchain import ChatFocusLLM, text_splitter
from focus_integrations.langchain._model import FocusModel
from tests.conftest import byte_level_tokenizer
from tests.langchain.conftest import tiny_engine

PAGE = (Path(__file__).parents[2] / "docs" / "langchain.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_pages_blocks_run(tmp_path, monkeypatch, capsys):
    """All blocks in order, as one programme, on a tiny engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "_engines", {(None, None, None, None): tiny_engine(chunk_size=256)})
    monkeypatch.setattr(text_splitter, "load_tokenizer", lambda name: byte_level_tokenizer())
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 5
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/langchain.md", "exec"), names)
    said = capsys.readouterr().out
    assert "Ada prefers letters to mail." in said
    assert "'name': 'lookup'" in said


def test_every_parameter_is_in_the_table():
    """Each own field of the models, and nothing that is none."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.split("## Parameters")[1].split("## Citations")[0], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    own = set(FocusModel.model_fields)
    assert own <= named
    assert named <= set(ChatFocusLLM.model_fields)
