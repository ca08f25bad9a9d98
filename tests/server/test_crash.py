"""Check a server that is a process of its own: killed while documents are uploaded, and started again."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from focus_core.engine import FocusEngine
from focus_core.store.database import Store
from focus_core.text.corpus import Document
from tests.server.conftest import wait

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
ROOT = Path(__file__).parents[2]
QUESTION = "who sat on the mat?"


@contextmanager
def process(base: str, store: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Run ``focusllm serve`` on a free port; killed with -9 when the block is left."""
    command = [sys.executable, "-m", "focus_core.cli", "serve", "--base", base, "--adapter", "untrained"]
    command += ["--store", str(store), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            line, said = "", []
            while not (found := re.search(r"http://\S+", line)):
                line = running.stderr.readline()
                said.append(line)
                assert line, said
            with httpx.Client(base_url=found[0], timeout=60) as client:
                yield running, client
        finally:
            running.kill()


def _batch(number: int, documents: int, sentences: int) -> dict[str, str]:
    """Documents that are sent as one change; no two have a chunk in common."""
    names = [f"{number}-{at}" for at in range(documents)]
    return {name: f"note {name}: " + f"the cat {name} sat on the mat. " * sentences for name in names}


def _send(client: httpx.Client, batch: Mapping[str, str]) -> dict[str, Any]:
    body = {"documents": [{"id": key, "text": text} for key, text in batch.items()]}
    sent: dict[str, Any] = client.post("/v1/memories/notes/documents", json=body).raise_for_status().json()
    return sent


def _held(client: httpx.Client) -> dict[str, str]:
    listed = client.get("/v1/memories/notes/documents").raise_for_status().json()["data"]
    one = "/v1/memories/notes/document"
    return {key["id"]: client.get(one, params={"id": key["id"]}).json()["text"] for key in listed}


def _answer(client: httpx.Client) -> str:
    body = {"model": client.get("/v1/models").json()["data"][0]["id"], "memories": ["notes"], "max_tokens": 6}
    body |= {"messages": [{"role": "user", "content": QUESTION}], "template": "question"}
    said = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return str(said["choices"][0]["message"]["content"])


def _check(
    client: httpx.Client, store: Path, engine: FocusEngine, done: Mapping[str, str], torn: dict[str, str]
) -> None:
    """All that was acknowledged is there, what was cut off whole or not at all; the answer is right."""
    held = _held(client)
    assert held in (done, {**done, **torn})
    assert Store(store, read_only=True).verify() == []
    memory = engine.remember([Document(key, text) for key, text in held.items()])
    assert _answer(client) == engine.answer(QUESTION, memory, max_tokens=6).text


@pytest.mark.slow
def test_a_killed_server_has_all_that_it_acknowledged(base_folder: str, tmp_path: Path) -> None:
    """Killed with -9 in the middle of an upload, then at a random moment of one: nothing is lost or half there."""
    engine, store = FocusEngine.from_pretrained(base_folder, "untrained"), tmp_path / "store"
    done = _batch(0, 3, 4)
    large, small = _batch(1, 24, 40), _batch(2, 4, 20)
    with process(base_folder, store) as (running, client):
        client.post("/v1/memories", json={"name": "notes"}).raise_for_status()
        assert wait(client, _send(client, done))["status"] == "completed"
        change = _send(client, large)
        while not (now := client.get(f"/v1/memories/notes/indexing/{change['id']}").json())["tokens_done"]:
            time.sleep(0.01)
        assert now["status"] == "in_progress"
        running.kill()
    with process(base_folder, store) as (running, client):
        assert client.get(f"/v1/memories/notes/indexing/{change['id']}").status_code == 404
        _check(client, store, engine, done, {})
        assert wait(client, _send(client, large))["status"] == "completed"
        done |= large
        _send(client, small)
        time.sleep(random.Random(0).random())
        running.kill()
    with process(base_folder, store) as (_, client):
        _check(client, store, engine, done, small)
        assert wait(client, _send(client, small))["status"] == "completed"
        _check(client, store, engine, {**done, **small}, {})
    engine.close()
