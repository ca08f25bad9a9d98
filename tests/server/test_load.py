"""Check what happens under load: queues, fairness, time limits, failures of one, equal answers, shutdown."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import httpx
import pytest

from focus_core.server.admission import Admission, QueueFullError
from tests.langchain.conftest import EndlessEngine, ScriptedEngine, tiny_engine
from tests.server.conftest import CONTRACTS, Running, fill, serving

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def _body(running: Running, question: str, **more: object) -> dict:
    return {"model": running.model, "messages": [{"role": "user", "content": question}], **more}


async def test_admission_is_bounded_by_number_and_bytes() -> None:
    admission, running, most = Admission(3, 100, 100), 0, [0, 0]

    async def one(nbytes: int) -> None:
        nonlocal running
        async with admission.admitted("a", nbytes):
            running += 1
            most[:] = max(most[0], running), max(most[1], admission.used)
            await asyncio.sleep(0.001)
            running -= 1

    await asyncio.gather(*(one(40) for _ in range(20)))
    assert most == [2, 80]
    await asyncio.gather(*(one(1) for _ in range(20)))
    assert most[0] == 3
    await one(1000)  # alone, any size is admitted
    assert (admission.running, admission.used, admission.waiting) == (0, 0, 0)


async def test_a_client_with_many_requests_delays_another_by_one_answer() -> None:
    admission, order = Admission(1, 100, 100), []

    async def one(client: str) -> None:
        async with admission.admitted(client, 1):
            order.append(client)
            await asyncio.sleep(0.001)

    await asyncio.gather(*(one("greedy") for _ in range(10)), one("modest"))
    assert order.index("modest") <= 2


async def test_a_full_queue_refuses_and_a_cancelled_wait_frees_its_place() -> None:
    admission = Admission(1, 1, 100)
    release = asyncio.Event()

    async def hold() -> None:
        async with admission.admitted("a", 1):
            await release.wait()

    first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError) as refused:
        async with admission.admitted("b", 1):
            pass
    assert refused.value.retry_after >= 1
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    third = asyncio.create_task(hold())
    release.set()
    await asyncio.gather(first, third)
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.slow
def test_one_request_too_many_is_429_with_a_time(tmp_path: Path) -> None:
    with serving(tiny_engine(EndlessEngine), tmp_path, running=1, waiting=1) as running:
        answers: list[httpx.Response] = []

        def ask() -> None:
            with running.client() as client:
                answers.append(client.post("/v1/chat/completions", json=_body(running, "who", max_tokens=900)))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert codes.count(200) >= 2
    assert set(codes) == {200, 429}
    busy = next(answer for answer in answers if answer.status_code == 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json()["error"]["code"] == "queue_full"


@pytest.mark.slow
def test_an_answer_has_a_time_limit(tmp_path: Path) -> None:
    with serving(tiny_engine(EndlessEngine), tmp_path, seconds=0.5) as running, running.client() as client:
        answer = client.post("/v1/chat/completions", json=_body(running, "who", max_tokens=7000))
        assert answer.status_code == 504
        assert "0.5 seconds" in answer.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=_body(running, "who", max_tokens=2)).status_code == 200


@pytest.mark.slow
async def test_answers_together_equal_each_alone(tmp_path: Path) -> None:
    """In float32 what runs together is what runs alone, whichever memories are read."""
    questions = [f"question {number} about the {word}" for number, word in enumerate(["cat", "dog", "hat", "mat"] * 4)]
    with serving(tiny_engine(EndlessEngine), tmp_path) as running:
        fill(running, "one", CONTRACTS)
        fill(running, "two", {"note": "the cat sat on the mat. " * 30})
        names = [["one"], ["two"], ["one", "two"], []]
        bodies = [
            _body(running, question, max_tokens=12, memories=names[number % 4])
            for number, question in enumerate(questions)
        ]
        async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
            alone = [(await client.post("/v1/chat/completions", json=body)).json()["choices"] for body in bodies]
            met = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
    assert [answer.json()["choices"][0]["message"]["content"] for answer in met] == [
        choices[0]["message"]["content"] for choices in alone
    ]


async def test_one_failure_leaves_the_others(tmp_path: Path) -> None:
    engine = tiny_engine(ScriptedEngine)
    chat = engine.chat

    def sometimes(messages, *more, **named):
        if "fail" in messages[-1].content:
            raise RuntimeError("a text that nobody may see")
        return chat(messages, *more, **named)

    engine.chat = sometimes  # type: ignore[method-assign]
    with serving(engine, tmp_path) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
            asked = [client.post("/v1/chat/completions", json=_body(running, text)) for text in ("a", "fail", "b", "c")]
            answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert "nobody may see" not in answers[1].text


def test_a_shutdown_finishes_what_runs_and_loses_no_memory(tmp_path: Path) -> None:
    engine = tiny_engine(ScriptedEngine)
    with serving(engine, tmp_path) as running, running.client() as client:
        client.post("/v1/memories", json={"name": "notes"})
        body = {"documents": [{"id": f"{number}", "text": "the cat sat. " * 200} for number in range(6)]}
        client.post("/v1/memories/notes/documents", json=body).raise_for_status()
        time.sleep(0.05)
    with serving(engine, tmp_path) as running, running.client() as client:
        assert client.get("/v1/memories/notes").json()["documents"] in (0, 6)  # all of it or none
