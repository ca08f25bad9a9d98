"""Run docs/llama_index.md's snippets word for word on a tiny model, and check that it names every parameter."""

from __future__ import annotations

import gc
import inspect
import re
from pathlib import Path

import pytest

from focus_core.session import engines
from focus_integrations import llama_index as package
from tests.conftest import tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "llama_index.md").read_text(encoding="utf-8")
INHERITED = {"model_config", "rate_limiter", "messages_to_prompt", "query_wrapper_prompt", "output_parser"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # LlamaIndex leaves its database open
def test_the_snippets_run(make_engine, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would paste them; every answer of it is generated."""
    engine = make_engine(model=tiny_model("llama", window=4096), window=4096, chunk_size=64, prompt_length=128)
    monkeypatch.setattr(engines, "_engines", {(None, None, None, None): engine})
    monkeypatch.setattr(
        "focus_integrations.llama_index.node_parser.load_tokenizer", lambda name: engine.loaded.tokenizer
    )
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 12
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/llama_index.md, block {number}", "exec"), names)
    assert names["response"].source_nodes
    assert names["index"].memory.store is not None
    gc.collect()


def test_every_parameter_is_documented():
    """Fields of models and arguments of constructors stand on the page."""
    wanted = set()
    for name in package.__all__:
        thing = getattr(package, name)
        fields = getattr(thing, "model_fields", None)
        if name.endswith("Event"):
            continue
        if fields is not None:
            wanted |= set(fields)
        else:
            wanted |= set(inspect.signature(getattr(thing, "from_index", thing)).parameters)
    generic = {"values", "options", "tokenizer_hash", "index", "block", "session_id", "top_k"}
    missing = sorted(name for name in wanted - generic - INHERITED if f"`{name}" not in PAGE and f"{name}`" not in PAGE)
    assert missing == []
