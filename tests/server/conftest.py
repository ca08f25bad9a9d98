"""Run servers on free ports of this machine: a scripted one that tests share, others with settings of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from focus_core.engine import FocusEngine
from focus_core.server.app import create_app
from focus_core.server.settings import ServerSettings
from tests.langchain.conftest import EndlessEngine, ScriptedEngine, tiny_engine

CONTRACTS = {
    "lease.txt": "Ada Miller signed the lease of the mill on the third of May.\n\n" * 8,
    "boat.txt": "The boat was sold to Carl Jansen for nine hundred euros.\n\n" * 8,
}


@dataclass
class Running:
    """A server that listens."""

    url: str
    engine: FocusEngine
    app: Any
    server: uvicorn.Server

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    @property
    def model(self) -> str:
        return self.engine.loaded.name


@contextmanager
def serving(engine: FocusEngine, folder: Path, **settings: Any) -> Iterator[Running]:
    """Serve on a free port until the block is left."""
    app = create_app(engine, ServerSettings(store=folder, port=0, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", engine, app, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def fill(running: Running, name: str, documents: dict[str, str], key: str | None = None) -> None:
    """Make a memory and wait until the documents are read."""
    with running.client(key) as client:
        client.post("/v1/memories", json={"name": name}).raise_for_status()
        body = {"documents": [{"id": key, "text": text} for key, text in documents.items()]}
        change = client.post(f"/v1/memories/{name}/documents", json=body).raise_for_status().json()
        assert wait(client, change)["status"] == "completed"


def wait(client: httpx.Client, change: dict[str, Any]) -> dict[str, Any]:
    """Wait until a change has ended; return its last state."""
    for _ in range(600):
        now: dict[str, Any] = client.get(f"/v1/memories/{change['memory']}/indexing/{change['id']}").json()
        if now["status"] not in ("queued", "in_progress"):
            return now
        time.sleep(0.02)
    raise AssertionError(f"{change} did not end")


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over the scripted engine, with the memory ``contracts``; tests must not change that memory."""
    pytest.importorskip("fastapi", reason="needs the extra focusllm[server]")
    engine = tiny_engine(ScriptedEngine)
    with serving(engine, tmp_path_factory.mktemp("scripted")) as running:
        fill(running, "contracts", CONTRACTS)
        yield running


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose answers have no end but max_tokens."""
    with serving(tiny_engine(EndlessEngine), tmp_path_factory.mktemp("endless")) as running:
        yield running


Serve = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """``with serve(engine, **settings) as running``."""
    return lambda engine, **settings: serving(engine, tmp_path / "store", **settings)
