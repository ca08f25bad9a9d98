"""Check what nobody who means well sends: odd numbers and names, other sites' forms, changes that meet."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from focus_core.server.memories import Memories
from focus_core.text.corpus import Document
from tests.langchain.conftest import ScriptedEngine, tiny_engine
from tests.server.conftest import CONTRACTS, Running, fill, serving, wait

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]
WHO = [{"role": "user", "content": "who signed the lease"}]
JSON = {"content-type": "application/json"}


@pytest.fixture
def own(tmp_path: Path):
    """A server with a store of its own and the memory ``notes``."""
    with serving(tiny_engine(ScriptedEngine), tmp_path / "store") as running:
        fill(running, "notes", {"a": "the cat sat on the mat."})
        yield running


def _together(running: Running, work: Callable[[httpx.Client, int], httpx.Response], count: int = 8) -> list[int]:
    def one(number: int) -> int:
        with running.client() as client:
            return work(client, number).status_code

    with ThreadPoolExecutor(count) as pool:
        return sorted(pool.map(one, range(count)))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('"seed": 1000000000000000000000000000000', "seed must be between"),
        ('"temperature": NaN', "got nan"),
        ('"memories": ["\\ud800"]', "unicode"),
        (f'"memories": {json.dumps(["notes"] * 65)}', "at most 64 items"),
        ('"memory_filter": ["a"]', "memory_filter needs memories"),
    ],
)
def test_odd_fields_are_refused_by_name(own: Running, field: str, said: str) -> None:
    text = json.dumps({"model": own.model, "messages": WHO})
    with own.client() as client:
        answer = client.post("/v1/chat/completions", content=f"{text[:-1]}, {field}}}", headers=JSON)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, "NaN", '"\\ud800"'])
def test_metadata_that_cannot_be_listed_are_refused(own: Running, value: str) -> None:
    """One bad document must not keep all others from being listed."""
    text = f'{{"documents": [{{"id": "b", "text": "x", "metadata": {{"a": {value}}}}}]}}'
    with own.client() as client:
        answer = client.post("/v1/memories/notes/documents", content=text, headers=JSON)
        assert answer.status_code == 400
        assert "metadata" in answer.json()["error"]["message"]
        assert [one["id"] for one in client.get("/v1/memories/notes/documents").json()["data"]] == ["a"]


def test_odd_texts_and_names_are_kept_and_cited(own: Running) -> None:
    names = ["naïve 🖋.txt", "../../etc/passwd", "\u202efdp.txt"]
    with own.client() as client:
        files = [("files", (name, b"the dog ate the hat.", "text/plain")) for name in names]
        assert wait(client, client.post("/v1/memories/notes/files", files=files).json())["status"] == "completed"
        text = '{"documents": [{"id": "n\\u0000l", "text": "a \\u0000 cat"}]}'
        change = client.post("/v1/memories/notes/documents", content=text, headers=JSON).json()
        assert wait(client, change)["status"] == "completed"
        listed = {one["id"] for one in client.get("/v1/memories/notes/documents").json()["data"]}
        assert listed == {"a", *names, "n\0l"}
        body = {"model": own.model, "messages": WHO, "memories": ["notes"], "citations": 9}
        whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["citations"]
        assert {one["document_id"] for one in whole} <= listed
        assert "[DONE]" in client.post("/v1/chat/completions", json={**body, "stream": True}).text


def test_two_documents_of_one_name_are_refused(own: Running) -> None:
    with own.client() as client:
        files = [("files", ("same.txt", text, "text/plain")) for text in (b"one", b"two")]
        answer = client.post("/v1/memories/notes/files", files=files)
    assert answer.status_code == 400
    assert "two documents are named 'same.txt'" in answer.json()["error"]["message"]


def test_other_sites_may_not_act_through_a_browser(own: Running, tmp_path: Path) -> None:
    """A form that another site sends, and a name that is made to point at this machine."""
    files = [("files", ("evil.txt", b"evil", "text/plain"))]
    with own.client() as client:
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            refused = client.post("/v1/memories/notes/files", files=files, headers={"origin": origin})
            assert refused.status_code == 403
        assert client.get("/v1/memories", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/v1/memories", headers={"origin": own.url}).status_code == 200
        assert client.get("/v1/memories/notes").json()["documents"] == 1
    named = "https://chat.example"
    with serving(tiny_engine(ScriptedEngine), tmp_path / "named", origins=(named,)) as running:
        with running.client() as client:
            answer = client.get("/v1/memories", headers={"origin": named})
        assert answer.headers["access-control-allow-origin"] == named


def test_one_of_many_makes_and_one_drops_a_memory(own: Running) -> None:
    made = _together(own, lambda client, _: client.post("/v1/memories", json={"name": "race"}))
    assert made == [201, *[409] * 7]
    assert _together(own, lambda client, _: client.delete("/v1/memories/race")) == [200, *[404] * 7]


def test_a_memory_dropped_while_it_is_asked_is_answered_or_gone(own: Running) -> None:
    for _ in range(3):
        fill(own, "gone", CONTRACTS)
        body = {"model": own.model, "messages": WHO, "memories": ["gone"]}

        def one(client: httpx.Client, number: int, body: dict = body) -> httpx.Response:
            return client.delete("/v1/memories/gone") if number == 2 else client.post("/v1/chat/completions", json=body)

        assert set(_together(own, one, 6)) <= {200, 404}


def test_a_filter_sees_the_documents_of_now(tmp_path: Path) -> None:
    """What was joined before a change is not taken for what is joined after it."""
    memories = Memories(tiny_engine(), tmp_path)
    memories.create("", "notes", False, None)
    for number in range(12):
        text = f"the cat {number} sat on the mat."
        memories.update("", "notes", [Document("a", text, {"kind": "x"})], (), lambda *_: None, lambda: None)
        part = memories.open("", ["notes"], {"kind": "x"}, lambda: None)
        assert [one.text for one in part.documents] == [text]


def test_what_nobody_foresaw_is_one_answer_and_no_message_in_the_log(
    own: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection goes on, and the log has the kind and the place, not what the error says."""

    secret = " ".join(["a text that", "nobody may see"])

    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError(secret)

    own.engine.chat = broken  # type: ignore[method-assign]
    body = {"model": own.model, "messages": WHO}
    with own.client() as client, caplog.at_level(logging.ERROR):
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 500
        assert client.get("/health").status_code == 200
    assert "unexpected RuntimeError" in caplog.text
    assert "nobody may see" not in answer.text + caplog.text
