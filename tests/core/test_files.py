"""Check that files are there whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from focus_core.files import replacing, write_atomically


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """fsync comes before the rename, and of the bytes that were written."""
    synced = []
    sync = os.fsync

    def record(number):
        facts = os.fstat(number)
        if stat.S_ISREG(facts.st_mode):
            synced.append(facts.st_size)
        sync(number)

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(tmp_path / "a", b"12345")
    with replacing(tmp_path / "b") as partial:
        partial.write_bytes(b"123")
        assert not (tmp_path / "b").exists()
    assert synced == [5, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_fails_leaves_the_old_file(tmp_path):
    """An error while writing: the old bytes, and nothing beside them."""
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="disk is full"), replacing(tmp_path / "a") as partial:  # noqa: PT012
        partial.write_bytes(b"ne")
        raise OSError("the disk is full")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
