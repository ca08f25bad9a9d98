"""Run one function in several processes at once, each the fork of one that has never started a thread.

A fork of the tests' own process would inherit the locks of threads that it does not have: MKL's allocator and torch's
pools may then wait for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from focus_core.method.ranks import Ranks
from focus_core.text.corpus import Document
from tests.conftest import byte_level_tokenizer, random_engine

PATIENCE = 240.0  # seconds


def together(
    folder: Path, count: int, work: Callable[..., object], documents: Sequence[Document], **settings: object
) -> list[Any]:
    """Return what ``work(ranks, engine, memory)`` gave in each of ``count`` processes.

    Each makes the engine of :func:`tests.conftest.random_engine` and a memory of the documents. An exception is (type,
    message, traceback), a process that died None. None of them outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    task = cloudpickle.dumps((work, list(documents), settings))
    processes = [context.Process(target=_run, args=(folder, rank, count, task), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    for process in processes:
        process.kill()
        process.join()
    places = [folder / f"{rank}.pt" for rank in range(count)]
    return [pickle.loads(place.read_bytes()) if place.exists() else None for place in places]


def _run(folder: Path, rank: int, count: int, task: bytes) -> None:
    torch.set_num_threads(1)
    try:
        work, documents, settings = pickle.loads(task)
        engine = random_engine(byte_level_tokenizer(), **settings)
        memory = engine.remember(documents)
        result = work(Ranks(f"file://{folder}/group", rank, count, seconds=PATIENCE), engine, memory)
    except Exception as error:
        result = (type(error), str(error), traceback.format_exc())
    (folder / f"{rank}.part").write_bytes(cloudpickle.dumps(result))
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    os._exit(0)
