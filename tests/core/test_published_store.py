"""Show that a published collection is read anywhere as it was: on a share, in memory, on S3; nothing is trusted."""

from __future__ import annotations

import json
import shutil

import fsspec
import pytest
import torch

from focus_core import Document
from focus_core.errors import ConfigError, FocusError, StoreError
from focus_core.session.engines import shared_memory
from focus_core.store import published
from focus_core.store.database import Store
from focus_core.store.places import find_place
from focus_core.store.published import Remote, open_published, publish_collection

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat and the dog ate the hat. "
DOCUMENTS = [Document(str(number), f"room {number} " + TEXT * (1 + number % 3), {"n": number}) for number in range(6)]


def logits(engine, memory):
    return engine.reading(memory.state, max_tokens=4).begin(engine.local_ids("who ate the hat?"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for what is fetched."""
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    published._held.clear()
    return tmp_path / "cache" / "published"


@pytest.fixture(params=["file", "memory", "s3"])
def address(request, tmp_path, monkeypatch):
    """An empty address on a share, in memory, and on a local S3 server."""
    if request.param == "file":
        return f"file://{tmp_path / 'share'}"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://share/contracts"
    return request.getfixturevalue("bucket") + "/contracts"


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of a local S3 server."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.clear_instance_cache()
    system.mkdir("corpora")
    yield "s3://corpora"
    system.clear_instance_cache()
    server.stop()


@pytest.fixture
def kept(make_engine, tmp_path):
    """An engine, and a store with a collection beside another one and another tenant's."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    memory.save(tmp_path / "own", name="contracts")
    engine.remember([Document("secret", "nobody may read this zebra")]).save(tmp_path / "own", name="private")
    engine.remember([Document("other", "a tenant has this walrus")]).save(Store(tmp_path / "own", tenant="anna"))
    return engine, Store(tmp_path / "own", read_only=True), memory


@pytest.mark.allow_hosts(["127.0.0.1", "0.0.0.0"])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_what_is_published_answers_as_what_was_kept(kept, address, cache, monkeypatch):
    """Bit for bit, anywhere; opening fetches the catalogue alone, a question each segment once, the next one none."""
    engine, store, memory = kept
    info = publish_collection(store, "contracts", address)
    assert info.documents == 0  # facts of a collection, counts left out
    read, original = [], Remote.read
    monkeypatch.setattr(Remote, "read", lambda self, name: read.append(name) or original(self, name))
    loaded = engine.load_memory(address)
    assert not [name for name in read if name.startswith("kv/")]
    assert torch.equal(logits(engine, loaded), logits(engine, memory))
    assert loaded.documents == memory.documents
    fetched = [name for name in read if name.startswith("kv/")]
    assert len(fetched) == len(set(fetched)) == len({engine.encoder.key(chunk) for chunk in memory.chunks})
    read.clear()
    again = engine.load_memory(address, where={"n": {"$lt": 2}})
    assert [one.id for one in again.documents] == ["0", "1"]
    logits(engine, again)
    assert read == ["published.json"]
    assert shared_memory(engine, address).documents == memory.documents
    with pytest.raises(StoreError, match="read only"):
        loaded.save(find_place(address).open(), name="contracts")
    with pytest.raises(StoreError, match="published"):
        find_place(address).open(read_only=False)


def test_nothing_else_is_published(kept, cache, tmp_path):
    """Neither another collection nor another tenant is told of, in no byte."""
    _, store, _ = kept
    publish_collection(store, "contracts", f"file://{tmp_path}/share")
    for file in (tmp_path / "share").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        assert not any(word in data for word in (b"zebra", b"walrus", b"private", b"anna")), file
    assert [info.name for info in open_published(f"file://{tmp_path}/share")[0].collections()] == ["contracts"]


def test_a_tenants_collection_is_published_under_plain_keys(kept, cache, tmp_path):
    """What a tenant publishes is read by whoever has the address, and its salt stays at home."""
    engine, store, _ = kept
    own = Store(store.folder, tenant="anna", read_only=True)
    publish_collection(own, "default", f"file://{tmp_path}/share")
    loaded = engine.load_memory(f"file://{tmp_path}/share")
    assert torch.equal(logits(engine, loaded), logits(engine, engine.remember(loaded.documents)))
    files = {file.stem for file in (tmp_path / "share" / "kv").rglob("*.safetensors")}
    assert not files & set(own.keys())


def test_a_reader_keeps_the_version_that_it_opened(kept, cache, tmp_path, monkeypatch):
    """Published again: who reads goes on as before, who opens sees the new one, and only what is new is written."""
    engine, store, memory = kept
    address = f"file://{tmp_path}/share"
    publish_collection(store, "contracts", address)
    before = engine.load_memory(address)
    expected = logits(engine, memory)
    memory.update([Document("new", "the walrus ate the cat")], ["3"])
    memory.save(store.folder, name="contracts")
    written, original = [], Remote.write
    monkeypatch.setattr(Remote, "write", lambda self, name, data: written.append(name) or original(self, name, data))
    publish_collection(store, "contracts", address)
    assert len([name for name in written if name.startswith("kv/")]) == 1
    assert written[-1] == "published.json"
    assert torch.equal(logits(engine, before), expected)
    after = engine.load_memory(address)
    assert after.documents == memory.documents
    assert torch.equal(logits(engine, after), logits(engine, memory))
    with pytest.raises(ConfigError, match="holds collection 'contracts'"):
        publish_collection(store, "private", address)


def test_a_stop_while_publishing_leaves_the_version_before(kept, cache, tmp_path, monkeypatch):
    """Whichever file cannot be written: what was published is what is read, and publishing again finishes it."""
    engine, store, memory = kept
    address = f"file://{tmp_path}/share"
    publish_collection(store, "contracts", address)
    memory.update([Document("new", "the walrus ate the cat")])
    memory.save(store.folder, name="contracts")
    original = Remote.write
    for stopped in ("kv/", "sqlite", "published.json"):

        def full(self, name, data, stopped=stopped):
            if stopped in name:
                raise StoreError("the disk is full")
            original(self, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "write", full)
            with pytest.raises(StoreError, match="full"):
                publish_collection(store, "contracts", address)
        assert [one.id for one in engine.load_memory(address).documents] == [one.id for one in DOCUMENTS]
    publish_collection(store, "contracts", address)
    assert engine.load_memory(address).documents == memory.documents


def test_what_is_damaged_there_is_refused_and_what_is_damaged_here_is_fetched_again(kept, cache, tmp_path, monkeypatch):
    """A flipped bit, a cut or a lost file at the address: one error that names it; in the cache nobody notices."""
    engine, store, memory = kept
    address, share = f"file://{tmp_path}/share", tmp_path / "share"
    publish_collection(store, "contracts", address)
    expected = logits(engine, memory)
    for path in [next(share.rglob("*.safetensors")), next(share.glob("*.sqlite")), share / "published.json"]:
        data = path.read_bytes()
        cases = (data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], data[: len(data) // 2], b"", None)
        for number, broken in enumerate(cases):  # a cache each: what reads ahead may still fetch for the one before
            monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / f"{path.suffix}-{number}"))
            path.unlink() if broken is None else path.write_bytes(broken)
            with pytest.raises(StoreError, match=r"damaged|lost|cut|nothing is published|cannot be read"):
                logits(engine, engine.load_memory(address))
            path.write_bytes(data)
    monkeypatch.setenv("FOCUSLLM_CACHE", str(cache.parent))
    assert torch.equal(logits(engine, engine.load_memory(address)), expected)
    for path in list(cache.rglob("*.safetensors"))[:2] + list(cache.rglob("*.sqlite")):
        for broken in (path.read_bytes()[:-1] + b"x", b"", None):
            path.unlink() if broken is None else path.write_bytes(broken)
            assert torch.equal(logits(engine, engine.load_memory(address)), expected)


@pytest.mark.parametrize(
    "manifest",
    [
        {"name": "contracts", "catalogue": "../../../etc/passwd", "digest": "", "format": 1},
        {"name": "contracts", "catalogue": "0" * 64, "digest": "", "format": 9},
        {"name": 3, "catalogue": "0" * 64, "digest": "", "format": 1},
        {"other": 1},
        [1],
    ],
)
def test_a_manifest_from_elsewhere_leads_nowhere(cache, tmp_path, manifest):
    """Only hashes make a path, and what is no snapshot is one clear error."""
    (tmp_path / "published.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"damaged|format 9|nothing that focusllm published"):
        open_published(f"file://{tmp_path}")


def test_the_cache_is_bounded(kept, cache, tmp_path, monkeypatch):
    """With room for a few segments alone the answer is the same, and no more than that lies on disk at any moment."""
    engine, store, memory = kept
    address = f"file://{tmp_path}/share"
    publish_collection(store, "contracts", address)
    size = max(path.stat().st_size for path in (tmp_path / "share").rglob("*.safetensors"))
    monkeypatch.setenv("FOCUSLLM_CACHE_SIZE", str(4 * size / (1 << 30)))
    most, original = 0, published._make_room

    def watched(fresh):
        nonlocal most
        original(fresh)
        most = max(most, fresh + sum(path.stat().st_size for path in cache.rglob("*.safetensors")))

    monkeypatch.setattr(published, "_make_room", watched)
    poor = engine.with_config(memory_budget=0)
    assert torch.equal(logits(poor, poor.load_memory(address)), logits(engine, memory))
    assert 0 < most <= 4 * size
    monkeypatch.setenv("FOCUSLLM_CACHE_SIZE", "much")
    with pytest.raises(ConfigError, match="FOCUSLLM_CACHE_SIZE"):
        published.cache_limit()


def test_addresses_that_cannot_be_read_are_one_error(make_engine, cache, tmp_path):
    """Nothing there, no such scheme, a folder that cannot be written: what to do is said."""
    engine = make_engine()
    engine.remember([Document("a", TEXT)]).save(tmp_path / "own")
    with pytest.raises(StoreError, match="nothing is published"):
        engine.load_memory(f"file://{tmp_path}/nothing")
    with pytest.raises(FocusError, match="cannot be opened"):
        engine.load_memory("zebra://bucket/x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be"):
        publish_collection(Store(tmp_path / "own"), "default", f"file://{tmp_path}/file/x")


def test_published_and_asked_from_the_command_line(run, cache, tmp_path, monkeypatch):
    """`focusllm publish NAME ADDRESS`, then `ask`, `show`, `info` and `verify` with the address."""
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text(TEXT)
    assert run("index", tmp_path / "a.txt", "--name", "contracts")[0] == 0
    address = f"file://{tmp_path}/share"
    code, _, err = run("publish", "contracts", address, model=False)
    assert code == 0, err
    assert address in err
    shutil.rmtree(tmp_path / "own")
    code, out, err = run("ask", "who sat?", "--memory", address, "--max-tokens", "2")
    assert code == 0, err
    assert "a.txt" in out + err
    assert "1 documents" in run("show", address, model=False)[2]
    assert run("verify", address, model=False)[0] == 0
    code, _, err = run("remove", address, model=False)
    assert (code, "published" in err) == (3, True)
    assert "Traceback" not in err
