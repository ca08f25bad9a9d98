"""Show that a Ray cluster computes what this process would, and that a killed worker loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from focus_core import Document, FocusEngine
from focus_core.errors import BaseModelError, ConfigError
from focus_core.session import cluster
from focus_core.session.cluster import RayEncoder, _batches, encode_rows
from focus_core.store.database import Store
from focus_core.store.indexing import index_documents

TEXT = "the cat sat on the mat. "
DOCUMENTS = [Document(str(number), f"room {number} " + TEXT * (3 + number % 5)) for number in range(24)]
needs_ray = pytest.mark.skipif(not cluster.has_ray(), reason="ray is not installed (focusllm[ray])")


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Two workers of this machine, of which one will be killed."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("FOCUSLLM_TEST_KILLED", str(tmp_path / "killed"))
    monkeypatch.setattr(cluster, "encode_rows", killed_once)
    monkeypatch.setattr(cluster, "_BATCH_TOKENS", {"cpu": 256, "cuda": 256})
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def killed_once(*arguments: object) -> list[bytes]:
    """Compute rows as a worker does; the worker that comes first kills itself with -9 at work."""
    with contextlib.suppress(FileExistsError):
        Path(os.environ["FOCUSLLM_TEST_KILLED"]).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_rows(*arguments)  # type: ignore[arg-type]


@needs_ray
@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.filterwarnings("ignore")
def test_a_killed_workers_documents_are_done_again(workers, base_folder, tmp_path):
    """Two workers, one killed with -9 at work: every document is there, whole, and answers as if read here."""
    engine = FocusEngine.from_pretrained(base_folder, "untrained", chunk_size=32, dtype=torch.float32)
    store = Store(tmp_path / "store")
    done: list[tuple[int, int]] = []
    encode = RayEncoder("auto", base_folder)
    index_documents(store, "default", engine.encoder, DOCUMENTS, progress=lambda *now: done.append(now), encode=encode)
    assert (tmp_path / "killed").exists()
    assert encode.workers == 2
    assert done[-1][0] == done[-1][1]
    assert store.verify() == []
    memory, here = engine.load_memory(tmp_path / "store"), engine.remember(DOCUMENTS)
    assert memory.documents == DOCUMENTS
    local = engine.local_ids("who sat?")
    torch.testing.assert_close(
        engine.reading(memory.state, max_tokens=2).begin(local),
        engine.reading(here.state, max_tokens=2).begin(local),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_worker_with_other_weights_is_refused(base_folder, make_engine):
    """What it computes is not put under this process's keys."""
    with pytest.raises(BaseModelError, match="other weights than this process"):
        cluster.encode_rows(base_folder, "0" * 64, "float32", "base", [[1, 2]])


def test_without_ray_the_error_says_what_to_install(run, tmp_path, monkeypatch):
    """`focusllm index --ray` where it is not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text("the cat sat")
    code, _, err = run("index", tmp_path / "a.txt", "--name", "a", "--ray", "auto")
    assert code == 2
    assert "focusllm[ray]" in err
    with pytest.raises(ConfigError, match="install it"):
        RayEncoder("auto", None)


def test_batches_hold_every_row_once_and_no_more_than_their_tokens(monkeypatch):
    """Rows of like lengths together; a row longer than a batch is one of its own."""
    monkeypatch.setattr(cluster, "_BATCH_TOKENS", {"cpu": 10})
    rows = {str(length): [0] * length for length in (3, 20, 4, 6, 1, 9)}
    batches = _batches(rows, "cpu")
    assert sorted(key for batch in batches for key in batch) == sorted(rows)
    assert all(sum(map(len, batch.values())) <= 10 or len(batch) == 1 for batch in batches)
    assert list(batches[-1]) == ["20"]
