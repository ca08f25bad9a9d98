"""Share a tiny engine, the model over it, and an event loop that is closed."""

from __future__ import annotations

import asyncio

import pytest

from focus_integrations.llama_index import FocusLLM
from tests.conftest import tiny_model


@pytest.fixture
def engine(make_engine):
    return make_engine(model=tiny_model("llama", window=1024), window=1024, chunk_size=64)


@pytest.fixture
def llm(engine):
    return FocusLLM(engine=engine, max_tokens=6)


@pytest.fixture
def own_loop():
    """LlamaIndex's asyncio_run leaves an event loop open in code that is not asynchronous; this one is closed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.close()
    asyncio.set_event_loop(None)
