"""Check named memories over HTTP: created, filled with progress, changed, pinned, dropped, kept, and whose they are."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from focus_core.errors import ConfigError
from focus_core.server.access import add_key, read_keys
from focus_core.server.memories import Memories
from focus_core.server.settings import ServerSettings
from focus_core.store.database import Store
from focus_core.text.corpus import Document
from tests import office
from tests.langchain.conftest import ScriptedEngine, tiny_engine
from tests.server.conftest import CONTRACTS, Running, fill, serving, wait

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def _ask(client: httpx.Client, running: Running, **more: object) -> httpx.Response:
    body = {"model": running.model, "messages": [{"role": "user", "content": "who signed the lease"}], **more}
    return client.post("/v1/chat/completions", json=body)


@pytest.fixture
def own(tmp_path: Path):
    """A server with a store of its own."""
    with serving(tiny_engine(ScriptedEngine), tmp_path / "store") as running:
        yield running


@pytest.mark.slow
def test_a_memory_is_made_filled_changed_and_dropped(own: Running) -> None:
    with own.client() as client:
        made = client.post("/v1/memories", json={"name": "contracts", "pinned": True})
        assert made.status_code == 201
        assert (made.json()["documents"], made.json()["pinned"]) == (0, True)
        assert client.post("/v1/memories", json={"name": "contracts"}).status_code == 409
        files = [("files", (name, text.encode(), "text/plain")) for name, text in CONTRACTS.items()]
        change = client.post("/v1/memories/contracts/files", files=files)
        assert change.status_code == 202
        assert wait(client, change.json())["status"] == "completed"
        (memory,) = client.get("/v1/memories").json()["data"]
        assert memory["documents"] == 2
        assert memory["bytes"] > 0
        listed = client.get("/v1/memories/contracts/documents").json()["data"]
        assert [one["id"] for one in listed] == list(CONTRACTS)
        one = client.get("/v1/memories/contracts/document", params={"id": "boat.txt"}).json()
        assert one["text"] == CONTRACTS["boat.txt"]
        assert client.delete("/v1/memories/contracts/document", params={"id": "boat.txt"}).json()["deleted"]
        assert client.delete("/v1/memories/contracts/document", params={"id": "boat.txt"}).status_code == 404
        cited = _ask(client, own, memories=["contracts"]).json()["choices"][0]["message"]["citations"]
        assert {one["document_id"] for one in cited} == {"lease.txt"}
        assert client.delete("/v1/memories/contracts").json()["deleted"]
        assert client.get("/v1/memories/contracts").status_code == 404
        assert _ask(client, own, memories=["contracts"]).status_code == 404


@pytest.mark.slow
def test_uploaded_documents_are_converted_and_cited_by_page(own: Running) -> None:
    pytest.importorskip("kreuzberg", reason="needs the converter: pip install 'focusllm[documents]'")
    pages = ["The lease of Ann ends in May.", "The boat of Bob is red."]
    files = [
        ("files", ("lease.pdf", office.pdf(pages), "application/pdf")),
        ("files", ("a.txt", "né".encode("latin-1"))),
    ]
    with own.client() as client:
        client.post("/v1/memories", json={"name": "papers"})
        change = client.post("/v1/memories/papers/files", files=files)
        assert wait(client, change.json())["status"] == "completed"
        held = client.get("/v1/memories/papers/document", params={"id": "lease.pdf"}).json()
        assert held["text"].index("The boat") == held["metadata"]["page_starts"][1]
        assert client.get("/v1/memories/papers/document", params={"id": "a.txt"}).json()["text"] == "né"
        cited = _ask(client, own, memories=["papers"]).json()["choices"][0]["message"]["citations"]
        assert {(one["document_id"], one["page"]) for one in cited} >= {("lease.pdf", 1)}
        torn = [("files", ("torn.pdf", b"%PDF-1.4 x", "application/pdf"))]
        refused = client.post("/v1/memories/papers/files", files=torn)
        assert refused.status_code == 400
        assert "torn.pdf cannot be converted" in refused.text


FIELDS = {
    *("type", "start", "end", "spans", "document_id", "document_title", "url", "page", "start_char_index"),
    *("end_char_index", "cited_text", "score"),
}


def test_citations_have_all_fields_whole_and_streamed(own: Running) -> None:
    """A document with pages: every field is what the store says, whole, streamed, as a completion, as Anthropic's."""
    pages = ["the cat sat on the mat. " * 8, "the dog ate the hat. " * 8]
    text, facts = "".join(pages), {"title": "Paper", "url": "http://paper", "page_starts": [0, len(pages[0])]}
    with own.client() as client:
        client.post("/v1/memories", json={"name": "papers"})
        body = {"documents": [{"id": "paper", "text": text, "metadata": facts}]}
        assert wait(client, client.post("/v1/memories/papers/documents", json=body).json())["status"] == "completed"
        whole = _ask(client, own, memories=["papers"], citations=9).json()["choices"][0]["message"]
        assert {one["page"] for one in whole["citations"]} == {1, 2}
        for one in whole["citations"]:
            assert set(one) == FIELDS
            assert text[one["start_char_index"] : one["end_char_index"]] == one["cited_text"]
            assert one["page"] == (2 if one["start_char_index"] >= len(pages[0]) else 1)
            assert (one["document_id"], one["document_title"], one["url"]) == ("paper", "Paper", "http://paper")
            assert 0 < one["score"] <= 1
            assert {"start": one["start"], "end": one["end"]} in one["spans"]
            assert all(0 <= span["start"] < span["end"] <= len(whole["content"]) for span in one["spans"])
        streamed = _ask(client, own, memories=["papers"], citations=9, stream=True).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        last = chunks[-1]["choices"][0]["delta"]
        assert last == {"citations": whole["citations"], "supported": None}  # the adapter was not fitted for it
        assert whole["supported"] is None
        asked = {"model": own.model, "memories": ["papers"], "max_tokens": 8}
        said = client.post("/v1/completions", json={**asked, "prompt": "the cat"}).json()["choices"][0]
        assert {"citations", "supported"} <= set(said)
        assert all(set(one) == FIELDS for one in said["citations"])
        turns = {**asked, "messages": [{"role": "user", "content": "who"}]}
        message = client.post("/v1/messages", json=turns).json()
        assert message["supported"] is None
        assert {one["page"] for one in message["content"][0]["citations"]} <= {1, 2}
        assert all(set(one) > FIELDS for one in message["content"][0]["citations"])


def test_progress_is_streamed_until_the_end(own: Running) -> None:
    with own.client() as client:
        client.post("/v1/memories", json={"name": "notes"})
        body = {"documents": [{"id": f"{number}", "text": "the cat sat on the mat. " * 60} for number in range(8)]}
        change = client.post("/v1/memories/notes/documents", json=body).json()
        with client.stream("GET", f"/v1/memories/notes/indexing/{change['id']}/events") as events:
            seen = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    assert seen[-1]["status"] == "completed"
    assert seen[-1]["tokens_done"] == seen[-1]["tokens_total"] > 500
    assert [one["tokens_done"] for one in seen] == sorted(one["tokens_done"] for one in seen)
    with own.client() as client:
        client.post("/v1/memories", json={"name": "again"})  # what is read already counts as done
        now = wait(client, client.post("/v1/memories/again/documents", json=body).json())
    assert now["tokens_done"] == now["tokens_total"] == seen[-1]["tokens_total"]


@pytest.mark.slow
def test_a_failed_or_stopped_change_leaves_the_memory_as_it_was(own: Running) -> None:
    fill(own, "notes", {"a": "the cat sat on the mat."})
    with own.client() as client:
        refused = client.post("/v1/memories/notes/documents", json={"documents": [{"id": "b", "text": "  "}]})
        assert refused.status_code == 400
        body = {"documents": [{"id": f"{number}", "text": "the dog ate the hat. " * 900} for number in range(40)]}
        change = client.post("/v1/memories/notes/documents", json=body).json()
        client.delete(f"/v1/memories/notes/indexing/{change['id']}")
        assert wait(client, change)["status"] == "cancelled"
        assert [one["id"] for one in client.get("/v1/memories/notes/documents").json()["data"]] == ["a"]


@pytest.mark.slow
def test_memories_outlive_the_server(tmp_path: Path) -> None:
    engine = tiny_engine(ScriptedEngine)
    with serving(engine, tmp_path) as running:
        fill(running, "contracts", CONTRACTS)
        with running.client() as client:
            before = _ask(client, running, memories=["contracts"]).json()["choices"]
    with serving(engine, tmp_path) as running, running.client() as client:
        assert client.get("/v1/memories/contracts").json()["documents"] == 2
        assert _ask(client, running, memories=["contracts"]).json()["choices"] == before


@pytest.mark.slow
def test_a_memory_is_dropped_when_its_time_is_over(own: Running) -> None:
    with own.client() as client:
        client.post("/v1/memories", json={"name": "short", "ttl_seconds": 1})
        client.post("/v1/memories", json={"name": "long", "ttl_seconds": 1, "pinned": True})
        time.sleep(1.1)
        assert [one["name"] for one in client.get("/v1/memories").json()["data"]] == ["long"]


def test_what_another_program_makes_anew_is_not_dropped_for_the_old_one(tmp_path: Path) -> None:
    """A memory with a time to live, dropped beside the server and made again there, has none."""
    engine = tiny_engine(ScriptedEngine)
    memories, store = Memories(engine, tmp_path), Store(tmp_path)
    memories.create("", "notes", False, 1)
    store.drop("notes")
    assert memories.list("") == []
    engine.remember([Document("new", "the cat")]).save(store, name="notes")
    time.sleep(1.1)
    ((info, keeping),) = memories.list("")
    assert (info.name, info.documents, keeping.ttl) == ("notes", 1, None)


@pytest.mark.slow
def test_several_memories_are_read_together_and_told_apart(own: Running) -> None:
    fill(own, "mine", {"note": "the cat sat on the mat."})
    fill(own, "yours", {"note": "the dog ate the hat."})
    with own.client() as client:
        cited = _ask(client, own, memories=["mine", "yours"], citations=9).json()["choices"][0]["message"]["citations"]
    texts = {one["document_id"]: one["cited_text"] for one in cited}
    assert texts.items() <= {"mine/note": "the cat sat on the mat.", "yours/note": "the dog ate the hat."}.items()


# -- access -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_tenants(tmp_path: Path):
    keys = tmp_path / "keys.json"
    made = {
        "ann": add_key(keys, "ann", "a", ["write"]),
        "bob": add_key(keys, "bob", "b", ["write"]),
        "eve": add_key(keys, "eve", "b", ["read"]),
        "root": add_key(keys, "root", "", ["admin"]),
    }
    with serving(tiny_engine(ScriptedEngine), tmp_path / "store", keys=keys) as running:
        fill(running, "secrets", CONTRACTS, made["ann"])
        yield running, made


@pytest.mark.slow
def test_a_tenant_sees_nothing_of_another(two_tenants) -> None:
    running, keys = two_tenants
    with running.client(keys["bob"]) as bob:
        assert bob.get("/v1/memories").json()["data"] == []
        tries = [
            bob.get("/v1/memories/secrets"),
            bob.get("/v1/memories/secrets/documents"),
            bob.get("/v1/memories/secrets/document", params={"id": "lease.txt"}),
            bob.delete("/v1/memories/secrets"),
            bob.delete("/v1/memories/secrets/document", params={"id": "lease.txt"}),
            bob.patch("/v1/memories/secrets", json={"pinned": True}),
            bob.post("/v1/memories/secrets/documents", json={"documents": [{"id": "x", "text": "y"}]}),
            _ask(bob, running, memories=["secrets"]),
            _ask(bob, running, memories=["a/secrets"]),
            _ask(bob, running, memories=["../a/secrets"]),
        ]
        never = bob.get("/v1/memories/never")
        assert {answer.status_code for answer in tries} == {404}
        assert tries[0].json()["error"]["message"].replace("secrets", "never") == never.json()["error"]["message"]
        assert not any("Ada" in answer.text for answer in tries)
        assert bob.post("/v1/memories", json={"name": "secrets"}).status_code == 201  # names are the tenant's own
        assert _ask(bob, running, memories=["secrets"]).status_code == 200
    with running.client(keys["ann"]) as ann:
        assert ann.get("/v1/memories/secrets").json()["documents"] == 2


@pytest.mark.slow
def test_answers_in_the_background_are_their_callers_own(two_tenants) -> None:
    running, keys = two_tenants
    with running.client(keys["ann"]) as ann, running.client(keys["bob"]) as bob:
        begun = _ask(ann, running, background=True).json()
        assert bob.get(f"/v1/chat/completions/{begun['id']}").status_code == 404
        assert bob.delete(f"/v1/chat/completions/{begun['id']}").status_code == 404
        assert ann.get(f"/v1/chat/completions/{begun['id']}").status_code == 200


@pytest.mark.slow
def test_scopes_say_what_a_key_may_do(two_tenants) -> None:
    running, keys = two_tenants
    with running.client() as nobody, running.client("fk-wrong") as wrong:
        for client in (nobody, wrong):
            answer = client.get("/v1/models")
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        assert nobody.get("/health").status_code == 200
    with running.client(keys["eve"]) as eve:
        assert eve.get("/v1/models").status_code == 200
        assert eve.post("/v1/memories", json={"name": "x"}).status_code == 403
        assert eve.get("/metrics").status_code == 403
    with running.client(keys["root"]) as root:
        before = root.get("/metrics").text
        assert _ask(root, running).status_code == 200
        assert 'focusllm_answers_total{outcome="done"} 1.0' not in before
        assert 'focusllm_answers_total{outcome="done"} 1.0' in root.get("/metrics").text
    header = {"x-api-key": keys["eve"]}
    assert httpx.get(f"{running.url}/v1/models", headers=header).status_code == 200


def test_keys_are_kept_as_hashes_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "ann", "a", ["write"])
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    caller = read_keys(path).caller(key)
    assert caller is not None
    assert (caller.name, caller.tenant, caller.scopes) == ("ann", "a", {"read", "write"})
    assert read_keys(path).caller(key[:-1]) is None
    with pytest.raises(ConfigError, match="already"):
        add_key(path, "ann")
    with pytest.raises(ConfigError, match="unknown scope 'owner'"):
        add_key(path, "bob", scopes=["owner"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_needs_keys(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no API keys"):
        ServerSettings(store=tmp_path, host=host)
    ServerSettings(store=tmp_path, host=host, keys=tmp_path / "keys.json")


def test_bodies_and_documents_have_limits(tmp_path: Path) -> None:
    limits = {"body_bytes": 4000, "document_bytes": 1000, "prompt_tokens": 200}
    with serving(tiny_engine(ScriptedEngine), tmp_path, **limits) as running, running.client() as client:
        client.post("/v1/memories", json={"name": "notes"})
        upload = {"documents": [{"id": "a", "text": "x" * 2000}]}
        assert client.post("/v1/memories/notes/documents", json=upload).status_code == 413
        upload = {"documents": [{"id": "a", "text": "x" * 9000}]}
        answer = client.post("/v1/memories/notes/documents", json=upload)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
        streamed = client.post("/v1/memories/notes/documents", content=iter([b"x" * 3000, b"y" * 3000]))
        assert streamed.status_code == 413
        body = {"model": running.model, "messages": [{"role": "user", "content": "word " * 400}]}
        assert "200 tokens" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_a_question_lists_no_other_memories(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a question costs before it is answered does not grow with the memories that a tenant has."""
    with own.client() as client:
        fill(own, "contracts", CONTRACTS)

        def every(store: Store) -> None:
            raise AssertionError("all collections were listed")

        monkeypatch.setattr(Store, "collections", every)
        assert _ask(client, own, memories=["contracts"]).status_code == 200
        assert _ask(client, own, memories=["others"]).status_code == 404
        assert client.get("/v1/memories/contracts").json()["documents"] == 2


def test_a_pinned_memory_keeps_its_place_in_memory(tmp_path: Path) -> None:
    """Pinning reaches the memory that is open; unpinned, it is opened anew as one of many."""
    memories = Memories(tiny_engine(), tmp_path)
    memories.create("", "a", False, None)
    memories.update("", "a", [Document("x", "the cat sat")], [], lambda done, total: None, lambda: None)
    memory = memories.open("", ["a"], None, lambda: None)
    source = memory.state.slabs[0].kv.source
    memories.keep("", "a", {"pinned": True})
    assert id(source) in source.budget._pinned
    assert memories.open("", ["a"], None, lambda: None) is memory
    memories.keep("", "a", {"pinned": False})
    again = memories.open("", ["a"], None, lambda: None).state.slabs[0].kv.source
    assert again is not source
    assert id(again) not in again.budget._pinned
