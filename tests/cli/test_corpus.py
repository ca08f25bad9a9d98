"""Keep collections from the command line: index, list, show, remove, verify, prune, export, import."""

from __future__ import annotations

import json
import os

import pytest

from focus_core.store.database import Store


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's own store."""
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat. " * 30)
    (folder / "b.md").write_text("the dog ate the hat. " * 5)
    return folder


@pytest.mark.slow
def test_a_collection_by_its_name(run, own, files):
    """index --name, then list, show, ask and chat by the name; only what changed is read again; remove and prune."""
    assert "2 new" in run("index", files, "--name", "contracts")[2]
    assert "2 unchanged" in run("index", files, "--name", "contracts")[2]
    code, out, _ = run("list", model=False)
    assert code == 0
    assert "contracts" in out
    code, out, _ = run("show", "contracts", model=False)
    assert out.split() == [str(files / "a.txt"), str(files / "b.md")]
    shown = json.loads(run("show", "contracts", "--json", model=False)[1])
    assert shown["documents"] == 2
    assert shown["entries"][0]["source"]["bytes"] == 720
    code, out, _ = run("ask", "who?", "--memory", "contracts", "--json", "--max-tokens", 2)
    assert {one["document_id"] for one in json.loads(out)["sources"]} == {str(files / "a.txt"), str(files / "b.md")}
    code, _, err = run("remove", "contracts", files / "a.txt", model=False)
    assert code == 0, err
    assert run("show", "contracts", model=False)[1].split() == [str(files / "b.md")]
    before = len(Store(own))
    assert "0 chunks deleted" in run("prune", model=False)[2]
    assert run("prune", "--older-than", 0, model=False)[0] == 0
    assert 0 < len(Store(own)) < before
    assert run("remove", "contracts", model=False)[0] == 0
    assert "no collections" in run("list", model=False)[2]


@pytest.mark.slow
def test_verify_finds_and_mends(run, own, files, base_folder):
    """Exit code 3 and the command that mends; after it all is as it was."""
    run("index", files, "--name", "x")
    assert "all as they were written" in run("verify", model=False)[2]
    path = next(own.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = run("verify", "x", model=False)
    assert code == 3
    assert "focusllm verify --repair" in err
    code, _, err = run("ask", "who?", "--memory", "x", "--max-tokens", 1)
    assert code == 3
    assert "verify --repair" in err
    code, _, err = run("verify", "x", "--repair", "--base", base_folder, model=False)
    assert code == 0, err
    assert "1 chunks computed again" in err
    assert run("verify", model=False)[0] == 0


@pytest.mark.slow
def test_export_and_import(run, own, files, tmp_path, monkeypatch):
    """One file carries a collection to another store; it answers equally; a damaged file is refused, nothing kept."""
    run("index", files, "--name", "x")
    _, expected, _ = run("ask", "who?", "--memory", "x", "--json", "--max-tokens", 3)
    code, _, err = run("export", "x", tmp_path / "x.focusllm", model=False)
    assert code == 0, err
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path / "other"))
    code, _, err = run("import", tmp_path / "x.focusllm", "--name", "y", model=False)
    assert code == 0, err
    _, found, _ = run("ask", "who?", "--memory", "y", "--json", "--max-tokens", 3)
    assert json.loads(found) | {"seconds": 0} == json.loads(expected) | {"seconds": 0}
    assert run("import", tmp_path / "x.focusllm", "--name", "y", model=False)[0] == 2
    data = (tmp_path / "x.focusllm").read_bytes()
    for number, broken in enumerate((data[:-9], data[: len(data) // 2], b"", b"PK" + os.urandom(99), _flipped(data))):
        monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path / f"broken{number}"))
        (tmp_path / "broken").write_bytes(broken)
        code, _, err = run("import", tmp_path / "broken", model=False)
        assert code == 3, err
        assert "Traceback" not in err
        assert Store(tmp_path / f"broken{number}").collections() == []


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "no saved memory 'nothing'"),
        (["remove", "x", "nothing"], "no document 'nothing' in collection 'x'"),
        (["verify", "nothing"], "no saved memory 'nothing'"),
        (["prune", "--memory", "nowhere"], "no store in nowhere"),
        (["export", "nothing", "file"], "no saved memory 'nothing'"),
        (["import", "nowhere"], "no file at nowhere"),
        (["index", "FILES", "--name", "../x"], "letters, digits"),
    ],
)
def test_what_is_not_there(run, own, files, arguments, message):
    """One message and no traceback."""
    run("index", files, "--name", "x")
    model = arguments[0] == "index"
    code, _, err = run(*[files if item == "FILES" else item for item in arguments], model=model)
    assert code in (2, 3)
    assert message in " ".join(err.split())
