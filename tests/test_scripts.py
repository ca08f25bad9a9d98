"""Check what runs on GPU machines: pieces that may be damaged, and the whole run with a tiny base."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "scripts/gpu"


@pytest.fixture
def pieces():
    spec = importlib.util.spec_from_file_location("pieces", GPU / "pieces.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(folder, source, names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_pieces_arrive_in_any_order_and_a_damaged_one_is_refused(pieces, tmp_path):
    """Last piece first, one twice, one damaged: the bundle opens when every piece is what the manifest says."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub/a.bin").write_bytes(bytes(range(256)) * 2000)
    pieces.cut("data", {"inside": source}, tmp_path / "cut", 0.2)
    names = sorted(path.name for path in (tmp_path / "cut").glob("data.0*"))
    assert len(names) > 2
    state = tmp_path / "state"
    first = _call(tmp_path / "1", tmp_path / "cut", ["data.json", names[-1]])
    assert pieces.take(first, state) == {"data": len(names) - 1}
    damaged = _call(tmp_path / "2", tmp_path / "cut", ["data.json", names[0]])
    (damaged / names[0]).write_bytes(b"x" + (damaged / names[0]).read_bytes()[1:])
    with pytest.raises(pieces.PiecesError, match=f"{names[0]} is not the piece"):
        pieces.take(damaged, state)
    assert pieces.take(_call(tmp_path / "3", tmp_path / "cut", ["data.json", *names]), state) == {"data": 0}
    assert (state / "data/inside/sub/a.bin").read_bytes() == (source / "sub/a.bin").read_bytes()
    assert pieces.take(first, state) == {"data": 0}  # a call that comes twice changes nothing
    assert not list((state / "incoming").iterdir())


@pytest.mark.slow
def test_the_run_of_a_base_works_from_end_to_end():
    """Pieces in, training stopped and gone on with elsewhere, losses, tables and the adapter in pieces back."""
    command = [sys.executable, str(GPU / "train_base.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "smoke: all well" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("kills", 6), ("damages", 25), ("full", 8), ("writers", 2), ("readers", 1), ("migrations", 3)]
)
def test_broken_stores_lose_nothing(kind, count):
    """The small form of each kind of fault: every trial ends in the right answer or in one error."""
    script = Path(__file__).parents[1] / "scripts/faults/store.py"
    ended = subprocess.run([sys.executable, script, kind, str(count), "--seed", "1"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 bad" in ended.stdout


@pytest.mark.slow
def test_a_large_base_is_measured_in_small(tmp_path):
    """The same code on a tiny random shape: every step runs, and the figures are written."""
    command = [sys.executable, str(GPU / "large_base.py"), "--smoke", "--output", str(tmp_path / "large.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    values = json.loads((tmp_path / "large.json").read_text())
    assert len(values["loss"]) == 3
    assert values["tokens_per_second"] > 0


@pytest.mark.slow
def test_the_step_is_checked_in_small():
    """The script that checks kernels and times steps on a card runs on the CPU, every format once."""
    command = [sys.executable, str(GPU / "check_step.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["format"] for line in lines if line.get("check") == "step"] == ["base", "int8", "int4"]
