"""Break stores in every way we can think of, and count what was lost, wrong or a traceback.

    python scripts/faults/store.py kills 500
    python scripts/faults/store.py damages 1000
    python scripts/faults/store.py full 50
    python scripts/faults/store.py writers 20
    python scripts/faults/store.py readers 20
    python scripts/faults/store.py migrations 50

A tiny random model stands in for a base: what is tried is the store. Each trial ends in the right answer or in one
error of focusllm; anything else is printed, counted, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

torch.set_num_threads(1)

from focus_core import Document, FocusEngine, FocusError  # noqa: E402
from focus_core.config import FocusConfig  # noqa: E402
from focus_core.model.candidate import CandidateAdapter  # noqa: E402
from focus_core.model.families import BaseDecoder  # noqa: E402
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint  # noqa: E402
from focus_core.store.database import Store  # noqa: E402
from focus_core.store.indexing import index_documents, repair_collection  # noqa: E402
from tests.conftest import byte_level_tokenizer, tiny_model  # noqa: E402

QUESTION = "who sat?"
Outcome = str
found: collections.Counter[Outcome] = collections.Counter()
bad: list[str] = []


def make_engine() -> FocusEngine:
    """Return an engine on a tiny random base."""
    model = tiny_model("llama").float()
    loaded = LoadedBase(model, byte_level_tokenizer(), "tiny", fingerprint(model))
    focus = FocusConfig(window=256, chunk_size=32, prompt_length=64)
    base = BaseDecoder(model)
    return FocusEngine(loaded, AdapterInfo("tiny", loaded.fingerprint, focus), CandidateAdapter(base), base=base)


def document(number: int, version: int = 0) -> Document:
    """Return a document of a few chunks that tells which it is."""
    text = f"room {number} holds {version}. " + "the cat sat on the mat and the dog ate the hat. " * (1 + number % 3)
    return Document(f"d{number}", text, {"number": number})


def answer(engine: FocusEngine, memory: object) -> list[int]:
    """Return the tokens of an answer."""
    return [token.id for token in engine.answer(QUESTION, memory, max_tokens=3).tokens]  # type: ignore[arg-type]


def check(engine: FocusEngine, folder: Path, allowed: Callable[[dict[str, str]], bool]) -> None:
    """Whether a store opens, holds what it may hold, and answers as a memory made anew of the same documents does."""
    memory = engine.load_memory(folder)
    texts = {one.id: one.text for one in memory.documents}
    if not allowed(texts):
        raise AssertionError(f"documents are lost or wrong: {sorted(texts)}")
    if answer(engine, memory) != answer(engine, engine.remember(memory.documents)):
        raise AssertionError("another answer than that of a memory made anew")
    if lost := Store(folder, read_only=True).verify():
        raise AssertionError(f"{len(lost)} chunks are damaged")


def trial(name: str, run: Callable[[], Outcome]) -> None:
    """Run one trial; count its outcome, or keep its traceback."""
    try:
        found[run()] += 1
    except FocusError as error:
        found[type(error).__name__] += 1
        if "Traceback" in str(error):
            bad.append(f"{name}: {error}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found[f"BAD {type(error).__name__}"] += 1
        bad.append(f"{name}: {traceback.format_exc(limit=-4)}")


# -- kills ------------------------------------------------------------------------------------------------------


def kills(engine: FocusEngine, count: int, rng: random.Random, work: Path) -> None:
    """Kill a child with -9 at a random moment of index, update, remove or prune; then everything committed is there."""
    folder = work / "store"
    index_documents(Store(folder), "default", engine.encoder, [document(number) for number in range(6)])
    began = time.monotonic()
    change(engine, folder, 0)
    longest = (time.monotonic() - began) * 1.2
    for number in range(1, count + 1):
        before = {one.id: one.text for one in engine.load_memory(folder).documents}
        child = os.fork()
        if child == 0:
            try:
                change(engine, folder, number)
                os._exit(0)
            except FocusError:
                os._exit(3)
            except BaseException:
                traceback.print_exc()
                os._exit(9)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)

        def run(number: int = number, before: dict[str, str] = before, status: int = status) -> Outcome:
            after = wanted(before, number)
            check(engine, folder, lambda texts: between(texts, before, after))
            if not os.WIFSIGNALED(status):
                if os.WEXITSTATUS(status):
                    raise AssertionError(f"the child ended with {os.WEXITSTATUS(status)}")
                return "done before the kill"
            return "killed, whole"

        trial(f"kill {number}", run)
        if rng.random() < 0.2:
            change(engine, folder, number)  # what was killed is taken up and finished


def change(engine: FocusEngine, folder: Path, number: int) -> None:
    """One round: two documents are indexed, one new and one changed, one is removed, and everything old is pruned."""
    store = Store(folder)
    index_documents(store, "default", engine.encoder, [document(number % 9, number), document(number % 5 + 9, number)])
    gone = f"d{(number + 3) % 9}"
    if gone in store.listing("default"):
        store.remove("default", [gone])
    store.prune(older_than=0 if number % 2 else 3600)


def wanted(before: dict[str, str], number: int) -> dict[str, str]:
    """Return what the documents are after a round."""
    fresh = [document(number % 9, number), document(number % 5 + 9, number)]
    after = {**before, **{one.id: one.text for one in fresh}}
    after.pop(f"d{(number + 3) % 9}", None)
    return after


def between(texts: dict[str, str], before: dict[str, str], after: dict[str, str]) -> bool:
    """Whether each document is as it was or as it should become: none lost, none of another text."""
    either = before.keys() | after.keys()
    held = all(texts.get(name) in (before.get(name), after.get(name)) for name in either)
    return held and texts.keys() <= either and (before.keys() & after.keys()) <= texts.keys()


# -- damages ----------------------------------------------------------------------------------------------------


def damages(engine: FocusEngine, count: int, rng: random.Random, work: Path) -> None:
    """Damage one file (or swap two) of a store: the right answer or one error, and no other text."""
    whole = work / "whole"
    memory = engine.remember([document(number) for number in range(12)])
    memory.save(whole)
    texts, expected = {one.id: one.text for one in memory.documents}, answer(engine, memory)
    for number in range(count):
        folder = work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        rows = [path for path in files if path.name.startswith("catalogue.sqlite")]
        name = damage(rng, files if number % 2 else rows, files)

        def run(name: str = name, folder: Path = folder) -> Outcome:
            loaded = engine.load_memory(folder)
            if {one.id: one.text for one in loaded.documents} != texts or loaded.documents != memory.documents:
                raise AssertionError("other documents")
            if answer(engine, loaded) != expected:
                raise AssertionError("another answer")
            return "the right answer"

        trial(f"damage {number}: {name}", run)

        def write(folder: Path = folder) -> Outcome:
            store = Store(folder)
            index_documents(store, "default", engine.encoder, [document(99)])
            repair_collection(store, "default", engine.encoder)
            check(engine, folder, lambda found: found == {**texts, "d99": document(99).text})
            return "written on, whole"

        trial(f"write after damage {number}: {name}", write)


def damage(rng: random.Random, files: list[Path], every: list[Path]) -> str:
    """Damage a file and return what was done."""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "empty", "delete", "append", "swap"])
    if kind == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut" and data:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    elif kind == "append":
        path.write_bytes(bytes(data) + rng.randbytes(7))
    else:
        other = rng.choice(every)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    return f"{kind} {path.name}"


# -- full disks -------------------------------------------------------------------------------------------------


def full(engine: FocusEngine, count: int, rng: random.Random, work: Path) -> None:
    """Fail the n-th write, sync, rename or folder of a change: one error, the version before, and then it goes on."""
    calls = ("fsync", "replace", "mkdir", "open")
    for number in range(count):
        folder = work / str(number)
        index_documents(Store(folder), "default", engine.encoder, [document(1)])
        name, limit = calls[number % len(calls)], number // len(calls) + 1

        def run(folder: Path = folder, name: str = name, limit: int = limit) -> Outcome:
            with failing(name, limit):
                try:
                    index_documents(Store(folder), "default", engine.encoder, [document(2), document(3)])
                    said = "not reached"
                except FocusError as error:
                    said = f"full at {name}: {type(error).__name__}"
            texts = {one.id for one in engine.load_memory(folder).documents}
            if texts not in ({"d1"}, {"d1", "d2", "d3"}):
                raise AssertionError(f"half a change: {texts}")
            index_documents(Store(folder), "default", engine.encoder, [document(2), document(3)])
            check(engine, folder, lambda found: set(found) == {"d1", "d2", "d3"})
            return said

        trial(f"full {number}: {name} {limit}", run)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def failing(name: str, limit: int) -> Iterator[None]:
    """Let the ``limit``-th call of a function of ``os`` find no space."""
    original, counted = getattr(os, name), 0

    def call(*arguments: object, **more: object) -> object:
        nonlocal counted
        counted += 1
        if counted == limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **more)

    setattr(os, name, call)
    try:
        yield
    finally:
        setattr(os, name, original)


def tmpfs(engine: FocusEngine, count: int, rng: random.Random, folder: Path) -> None:
    """Fill a small file system (``--folder``, made by the caller) until a change fails; what was committed is there."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    store, held = Store(folder / "store"), {}
    for number in range(count):
        try:
            index_documents(store, "default", engine.encoder, [document(number)])
            held[f"d{number}"] = document(number).text
            found["written"] += 1
        except FocusError as error:
            found[f"full: {type(error).__name__}"] += 1
            trial(f"tmpfs {number}", lambda: _still(engine, folder / "store", held))
            store.remove("default", [next(iter(held))])
            held.pop(next(iter(held)))
            store.prune(older_than=0)


def _still(engine: FocusEngine, folder: Path, held: dict[str, str]) -> Outcome:
    check(engine, folder, lambda texts: texts == held)
    return "full, whole"


# -- writers and readers ----------------------------------------------------------------------------------------


def writers(engine: FocusEngine, count: int, rng: random.Random, work: Path) -> None:
    """Two and four processes index into one collection at once, one of them a new store: nothing is lost."""
    for number in range(count):
        folder, several = work / str(number), 2 if number % 2 else 4
        children = []
        for writer in range(several):
            child = os.fork()
            if child == 0:
                try:
                    for step in range(4):
                        memory = engine.remember([document(writer * 10 + step)])
                        memory.save(folder)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(9)
            children.append(child)
        ended = [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children]

        def run(folder: Path = folder, several: int = several, ended: list[int] = ended) -> Outcome:
            if any(ended):
                raise AssertionError(f"writers ended with {ended}")
            names = {f"d{writer * 10 + step}" for writer in range(several) for step in range(4)}
            check(engine, folder, lambda texts: set(texts) == names)
            return f"{several} writers, whole"

        trial(f"writers {number}", run)
        shutil.rmtree(folder, ignore_errors=True)


def readers(engine: FocusEngine, count: int, rng: random.Random, work: Path) -> None:
    """Read and answer while a process changes and prunes everything it can: the right answer or one error."""
    for number in range(count):
        folder = work / str(number)
        index_documents(Store(folder), "default", engine.encoder, [document(one) for one in range(6)])
        child = os.fork()
        if child == 0:
            try:
                for step in range(6):
                    change(engine, folder, step * 2 + 1)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(9)

        def run(folder: Path = folder) -> Outcome:
            memory = engine.load_memory(folder)
            if answer(engine, memory) != answer(engine, engine.remember(memory.documents)):
                raise AssertionError("another answer")
            return "read during a prune"

        while os.waitpid(child, os.WNOHANG) == (0, 0):
            trial(f"reader {number}", run)
        shutil.rmtree(folder, ignore_errors=True)


# -- migrations -------------------------------------------------------------------------------------------------


def migrations(engine: FocusEngine, count: int, rng: random.Random, work: Path) -> None:
    """Kill the migration of an old folder at a random moment: the next opening finds everything."""
    from tests.core.test_migration import old_memory

    memory = engine.remember([document(number) for number in range(12)])
    expected = answer(engine, memory)
    old_memory(work / "timed", memory)
    began = time.monotonic()
    Store(work / "timed")
    longest = (time.monotonic() - began) * 1.2
    for number in range(count):
        folder = work / str(number)
        old_memory(folder, memory)
        child = os.fork()
        if child == 0:
            Store(folder)
            os._exit(0)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

        def run(folder: Path = folder) -> Outcome:
            loaded = engine.load_memory(folder)
            if loaded.documents != memory.documents or answer(engine, loaded) != expected:
                raise AssertionError("other documents or another answer")
            check(engine, folder, lambda texts: len(texts) == 12)
            return "brought along"

        trial(f"migration {number}", run)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run one kind of fault and print what came of it."""
    kinds = {run.__name__: run for run in (kills, damages, full, tmpfs, writers, readers, migrations)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.folder or Path(folder)
        kinds[arguments.kind](make_engine(), arguments.count, random.Random(arguments.seed), place)
    for outcome, times in found.most_common():
        print(f"{times:6} {outcome}")
    for text in bad[:5]:
        print(text)
    print(f"{arguments.kind}: {sum(found.values())} trials, {len(bad)} bad, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
