"""Check that no malformed request makes the server fail: schemathesis over its OpenAPI, and dropped connections."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Unsatisfiable

from tests.langchain.conftest import ScriptedEngine, tiny_engine
from tests.server.conftest import Running, serving

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

REQUESTS = 1_000
# events of a stream end when the stream does; what is deleted is gone for the next request
LEFT_OUT = ("/v1/memories/{name}/indexing/{key}/events",)


@pytest.mark.slow
def test_malformed_requests_and_no_500(tmp_path: Path) -> None:
    """Each is refused with one error in the interface's form, or answered."""
    with serving(tiny_engine(ScriptedEngine), tmp_path, prompt_tokens=500, seconds=20.0) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations() if found.ok().path not in LEFT_OUT]
        seen: list[int] = []
        for operation in operations:
            _send(operation, running, REQUESTS // len(operations) // 2 + 1, seen)
        while len(seen) < REQUESTS:  # what has no parameters gave fewer
            _send(operations[len(seen) % len(operations)], running, 20, seen)
        assert len(seen) >= REQUESTS
        assert max(seen) < 500
        with running.client() as client:
            assert client.get("/ready").status_code == 200


def _send(operation: Any, running: Running, count: int, seen: list[int]) -> None:
    """Send ``count`` well-formed and ``count`` malformed requests."""
    from hypothesis import given

    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    quick = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    for mode in modes:

        @quick
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Any) -> None:
            answer = case.call(base_url=running.url, timeout=60)
            seen.append(answer.status_code)
            assert answer.status_code < 500, (case.method, case.path, case.body, answer.text)
            if answer.status_code >= 400:
                assert "error" in answer.json(), answer.text

        try:
            one()
        except Unsatisfiable:  # nothing of an operation without parameters can be malformed
            assert mode == schemathesis.GenerationMode.NEGATIVE


@pytest.mark.slow
def test_connections_dropped_at_random_moments_leave_a_right_answer(endless: Running) -> None:
    host, port = endless.url.removeprefix("http://").split(":")
    asked = {"model": endless.model, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps({**asked, "max_tokens": 60})
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    answer = {"model": endless.model, "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
    with endless.client() as client:
        right = client.post("/v1/chat/completions", json=answer).json()["choices"]
    draw = random.Random(0)
    for _ in range(100):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request[: draw.randint(1, len(request))] if draw.random() < 0.5 else request)
            if draw.random() < 0.5:
                time.sleep(draw.random() * 0.03)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    connection.recv(draw.randint(1, 4000))
    with endless.client() as client:
        assert client.post("/v1/chat/completions", json=answer).json()["choices"] == right
        limit = time.monotonic() + 20
        while "focusllm_answers_running 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < limit
            time.sleep(0.05)
