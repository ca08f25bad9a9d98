"""Publish a collection as an immutable snapshot at any address, and read it from there.

A snapshot is a catalogue of one collection, named by its hash, beside segments named by their keys; ``published.json``,
written last, says which catalogue is meant. So a reader sees one version whole, whatever is published there meanwhile.
Segments are fetched when a question needs them, into a local cache with a bound, and compared with the catalogue's
checksums. Nothing at an address is trusted: only hashes make a path, and everything is compared with its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from focus_core.errors import ConfigError, StoreError
from focus_core.files import CATALOGUE, write_atomically
from focus_core.model.sources import cache_folder
from focus_core.store.catalogue import Catalogue
from focus_core.store.collections import Change, CollectionInfo, Contents, commit_change
from focus_core.store.database import Store
from focus_core.store.portable import plain_key
from focus_core.store.segments import SegmentFacts, Segments, pack_segment

FORMAT = 1
MANIFEST = "published.json"

_HASH = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 8  # segments that are carried at the same time
_CACHE_GIB = 20.0

Progress = Callable[[int, int], None]


def is_address(place: object) -> bool:
    """Whether what names a memory is an address: ``s3://bucket/contracts``, ``hf://datasets/OWNER/NAME``, ``file://``."""
    return isinstance(place, str) and "://" in place


@dataclass(frozen=True)
class Snapshot:
    """What ``published.json`` says.

    Args:
        name: of the collection.
        catalogue: sha256 of the catalogue, which is its name too.
        digest: hash over the collection's ordered rows.
        format: of the snapshot.
    """

    name: str
    catalogue: str
    digest: str
    format: int = FORMAT


class Remote:
    """The files at an address.

    Args:
        address: anything that fsspec opens.

    Raises:
        ConfigError: the address cannot be understood, or a package for it is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{address!r} cannot be opened ({error}); install the package for it (s3fs for s3://), or give another "
                "address"
            ) from error

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises ``FileNotFoundError`` where it is not, ``StoreError`` for all else."""
        with self._telling("read", FileNotFoundError):
            return bytes(self.system.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Write a file; on file systems of this machine it appears whole."""
        with self._telling("written"):
            if isinstance(self.system, LocalFileSystem):
                path = Path(self.root, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
            else:
                self.system.pipe_file(f"{self.root}/{name}", data)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the files below a folder with their bytes."""
        with self._telling("listed"):
            self.system.invalidate_cache()
            there = self.system.exists(f"{self.root}/{folder}")
            found = self.system.find(f"{self.root}/{folder}", detail=True) if there else {}
        return {name.rsplit("/", 1)[-1]: int(facts["size"]) for name, facts in found.items()}

    def snapshot(self) -> Snapshot | None:
        """Return what is published here, ``None`` where nothing is; raises ``StoreError`` for what is no snapshot."""
        try:
            found = json.loads(self.read(MANIFEST))
            snapshot = Snapshot(**found)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError) as error:
            raise StoreError(f"{self.address} is damaged or nothing that focusllm published ({error})") from error
        if snapshot.format != FORMAT:
            raise StoreError(f"{self.address} has format {snapshot.format!r}, this version reads {FORMAT}")
        if not isinstance(snapshot.name, str) or not _HASH.fullmatch(str(snapshot.catalogue)):
            raise StoreError(f"{self.address} is damaged: its {MANIFEST} names no catalogue")
        return snapshot

    @contextmanager
    def _telling(self, done: str, *known: type[Exception]) -> Iterator[None]:
        try:
            yield
        except known:
            raise
        except Exception as error:  # whatever a file system raises
            raise StoreError(
                f"{self.address} cannot be {done} ({type(error).__name__}: {error}); check address, network and rights"
            ) from error


# -- writing ----------------------------------------------------------------------------------------------------


def publish_collection(
    store: Store, name: str, address: str, progress: Progress = lambda done, total: None
) -> CollectionInfo:
    """Write a collection to an address; only chunk KV that is not there is written, and nothing there is deleted.

    Args:
        store: that has it.
        name: of the collection.
        address: anything that fsspec can write to; it holds one collection, whose next version takes its place.
        progress: called with chunks done and to do.

    Raises:
        StoreError: there is no such collection, it is damaged, or the address cannot be written.
        ConfigError: another collection is published there.
    """
    contents, remote = store.read(name), Remote(address)
    there = remote.snapshot()
    if there is not None and there.name != name:
        raise ConfigError(f"{address} holds collection {there.name!r}; publish {name!r} at an address of its own")
    facts = _write_segments(store, contents, remote, progress)
    data, info = _catalogue_of(contents, facts)
    digest = hashlib.sha256(data).hexdigest()
    remote.write(f"{digest}.sqlite", data)
    remote.write(MANIFEST, json.dumps(asdict(Snapshot(name, digest, info.digest))).encode())
    return info


def _write_segments(store: Store, contents: Contents, remote: Remote, progress: Progress) -> dict[str, SegmentFacts]:
    keys = {address: plain_key(contents.info.facts, chunk) for address, chunk in contents.chunks}
    there, facts = remote.sizes("kv"), {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = []
        for done, (address, key) in enumerate(keys.items(), start=1):
            data, facts[key] = pack_segment(key, store.read_segment(address))
            if there.get(f"{key}.safetensors") != len(data):
                waiting.append(pool.submit(remote.write, _place(key), data))
            if len(waiting) >= 2 * _AT_ONCE:
                waiting.pop(0).result()
            progress(done, len(keys))
        for one in waiting:
            one.result()
    return facts


def _catalogue_of(contents: Contents, facts: dict[str, SegmentFacts]) -> tuple[bytes, CollectionInfo]:
    """Return a catalogue, as one file, of a collection alone: no other collection or tenant is told of."""
    info = contents.info
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(Path(folder) / CATALOGUE)
        catalogue.create()
        chunks = [(plain_key(info.facts, chunk), chunk) for _, chunk in contents.chunks]
        with catalogue.writing() as index:
            index.executemany(
                "INSERT INTO segments VALUES (?,?,?,?,0)",
                [(key, one.size, one.nbytes, one.to_json()) for key, one in facts.items()],
            )
            change = Change(contents.documents, chunks, set(contents.documents))
            made = commit_change(index, "", info.name, info.facts, info.config, change)
        with closing(sqlite3.connect(catalogue.path)) as index:
            index.execute("PRAGMA journal_mode = DELETE")  # one file
        return catalogue.path.read_bytes(), made


def _place(key: str) -> str:
    return f"kv/{key[:2]}/{key}.safetensors"


# -- reading ----------------------------------------------------------------------------------------------------


def open_published(address: str) -> tuple[Store, str]:
    """Open what is published at an address: a store to be read only, and the name of its collection.

    The catalogue is fetched, and no chunk KV.

    Raises:
        StoreError: nothing is published there, it is damaged, or the address cannot be read.
        ConfigError: no package for such addresses is installed.
    """
    remote = Remote(address)
    snapshot = remote.snapshot()
    if snapshot is None:
        raise StoreError(f"nothing is published at {address}; publish with `focusllm publish NAME {address}`")
    kept = _cache() / hashlib.sha256(remote.address.encode()).hexdigest()[:16]
    path = kept / snapshot.catalogue / CATALOGUE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != snapshot.catalogue:
        try:
            data = remote.read(f"{snapshot.catalogue}.sqlite")
        except FileNotFoundError as error:
            raise StoreError(f"{address} is damaged: its catalogue is missing; publish it again") from error
        if hashlib.sha256(data).hexdigest() != snapshot.catalogue:
            raise StoreError(f"{address} is damaged: its catalogue is not what was published; publish it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    store = Store(path.parent, read_only=True)
    store.segments = FetchedSegments(kept / "kv", remote)
    return store, snapshot.name


class FetchedSegments(Segments):
    """Segments at an address, kept in a folder of this machine while there is room.

    Args:
        folder: where they are kept.
        remote: where they are.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        super().__init__(folder)
        self.remote = remote

    def whole(self, key: str, size: int) -> bool:
        """Take the catalogue's word: whether a segment is there is found out when it is fetched."""
        return True

    def prepare(self, wanted: Sequence[tuple[str, SegmentFacts]]) -> None:
        """Fetch several segments at once, if the cache can hold all of them."""
        missing = [one for one in wanted if not super(FetchedSegments, self).whole(one[0], one[1].size)]
        if len(missing) > 1 and sum(facts.size for _, facts in wanted) <= cache_limit():
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda one: self._fetch(*one), missing))

    def read(self, key: str, facts: SegmentFacts) -> dict[str, Tensor]:
        """See :meth:`Segments.read`; what is damaged here is fetched again once."""
        return self._twice(key, facts, lambda: super(FetchedSegments, self).read(key, facts))

    def read_layer(self, key: str, facts: SegmentFacts, layer: int) -> dict[str, Tensor]:
        """See :meth:`Segments.read_layer`; what is damaged here is fetched again once."""
        return self._twice(key, facts, lambda: super(FetchedSegments, self).read_layer(key, facts, layer))

    def _twice(self, key: str, facts: SegmentFacts, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self.path(key)
        if super().whole(key, facts.size):
            try:
                os.utime(path)
                return read()
            except (StoreError, OSError):  # damaged here, or it had to make room a moment ago
                path.unlink(missing_ok=True)
        self._fetch(key, facts)
        try:
            return read()
        except StoreError as error:
            path.unlink(missing_ok=True)
            raise StoreError(
                f"chunk {key[:12]} at {self.remote.address} is damaged; publish the collection again"
            ) from error

    def _fetch(self, key: str, facts: SegmentFacts) -> None:
        path = self.path(key)
        try:
            data = self.remote.read(_place(key))
        except FileNotFoundError as error:
            raise StoreError(
                f"chunk {key[:12]} at {self.remote.address} is lost; publish the collection again"
            ) from error
        if len(data) != facts.size:
            raise StoreError(f"chunk {key[:12]} at {self.remote.address} is cut; publish the collection again")
        _make_room(len(data))
        try:
            self._make(path.parent)
            write_atomically(path, data)
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written ({error}); set FOCUSLLM_CACHE to another") from error


# -- the cache --------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_held: dict[Path, int] = {}


def cache_limit() -> int:
    """Return the most bytes of fetched chunk KV that stay on this machine: ``FOCUSLLM_CACHE_SIZE`` in GiB, else 20.

    Raises:
        ConfigError: the variable is no number.
    """
    given = os.environ.get("FOCUSLLM_CACHE_SIZE", "") or _CACHE_GIB
    try:
        return int(float(given) * (1 << 30))
    except ValueError as error:
        raise ConfigError(f"FOCUSLLM_CACHE_SIZE must be a number of GiB; got {given!r}") from error


def _cache() -> Path:
    return cache_folder() / "published"


def _make_room(size: int) -> None:
    """Delete the segments that were used longest ago until one of ``size`` bytes fits; readers fetch them again."""
    root, limit = _cache(), cache_limit()
    with _lock:
        held = _held.get(root)
        if held is None or held + size > limit:
            found = sorted((*_facts(path), path) for path in root.glob("*/kv/*/*.safetensors"))
            held = sum(length for _, length, _ in found)
            most = limit if held + size <= limit else int(0.9 * limit)  # not at every segment anew
            for _, length, path in found:
                if held + size <= most:
                    break
                path.unlink(missing_ok=True)
                held -= length
        _held[root] = held + size


def _facts(path: Path) -> tuple[float, int]:
    try:
        found = path.stat()
    except FileNotFoundError:  # another process made room
        return 0.0, 0
    return found.st_mtime, found.st_size
