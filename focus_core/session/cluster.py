"""Compute chunk KV on the machines of a Ray cluster; the caller's process alone writes it into the store.

Workers are given token ids and return segments; they know no document and touch no store. What a worker that died was
doing is given to another, so a killed worker loses nothing and writes nothing. Needs ray (``focusllm[ray]``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from safetensors.torch import load, save

from focus_core.config import KVFormat
from focus_core.errors import BaseModelError, ConfigError, FocusError
from focus_core.hardware import dtype_name
from focus_core.method.encoding import Check, encode_chunks, kv_shape
from focus_core.method.kv import ChunkKV
from focus_core.session.engines import shared_engine
from focus_core.store.database import Store
from focus_core.store.encoder import ChunkEncoder
from focus_core.text.chunking import Chunk

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_RETRIES = 10  # of a batch whose worker dies
_AHEAD = 2  # batches a worker, so that none waits for the writer


class RayEncoder:
    """Computes the chunk KV of an index run on a cluster; called as :func:`~focus_core.store.indexing.encode_missing`.

    Args:
        address: of the cluster: ``auto`` for the one that this machine belongs to, ``local`` for workers of this
            machine alone, ``ray://HOST:PORT`` for another.
        base: what every machine of it loads, as ``FocusEngine.from_pretrained`` takes it.

    Raises:
        ConfigError: ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, base: str | None) -> None:
        self.base, self._ray = base, _import_ray()
        try:
            if not self._ray.is_initialized():
                self._ray.init(address=address, log_to_driver=False, include_dashboard=False)
            found = self._ray.cluster_resources()
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`") from error
        self.device = "cuda" if found.get("GPU", 0) >= 1 else "cpu"
        self.workers = int(found.get("GPU", 0) or found.get("CPU", 1))

    @property
    def tokens_at_once(self) -> int:
        """Tokens that keep all workers at work."""
        return self.workers * _AHEAD * _BATCH_TOKENS[self.device]

    def __call__(
        self, store: Store, encoder: ChunkEncoder, chunks: Iterable[Chunk], report: Callable[[int], None], check: Check
    ) -> None:
        """Compute the KV of the chunks that the store has not, and put it there.

        Raises:
            BaseModelError: a worker has other weights, or fails.
        """
        wanted = {encoder.key(chunk): chunk for chunk in chunks}
        held = store.holds(wanted)
        done = sum(len(wanted[key].ids) for key in held)
        batches = _batches({key: encoder.row(wanted[key]) for key in wanted if key not in held}, self.device)
        waiting: dict[Any, dict[str, list[int]]] = {}
        try:
            while batches or waiting:
                check()
                while batches and len(waiting) < self.workers * _AHEAD:
                    batch = batches.pop()
                    waiting[self._begin(encoder, list(batch.values()))] = batch
                ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=1.0)
                for reference in ready:
                    batch = waiting.pop(reference)
                    segments = self._result(reference)
                    store.put_all({key: load(data) for key, data in zip(batch, segments, strict=True)})
                    done += sum(len(wanted[key].ids) for key in batch)
                    report(done)
        finally:
            for reference in waiting:
                self._ray.cancel(reference)

    def _begin(self, encoder: ChunkEncoder, rows: list[list[int]]) -> Any:
        task = self._ray.remote(encode_rows)
        needs = {"num_gpus": 1} if self.device == "cuda" else {"num_cpus": 1}
        return task.options(max_retries=_RETRIES, **needs).remote(
            self.base, encoder.fingerprint, dtype_name(encoder.base.dtype), encoder.config.kv_format, rows
        )

    def _result(self, reference: Any) -> list[bytes]:
        try:
            return list(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, FocusError):
                raise cause from error
            raise BaseModelError(f"a worker could not compute chunk KV ({error}); see its log") from error


def encode_rows(
    base: str | None, fingerprint: str, dtype: str, kv_format: KVFormat, rows: list[list[int]]
) -> list[bytes]:
    """Return the segment of each row of token ids, sink included; runs in a worker.

    Raises:
        BaseModelError: the worker has other weights under this name than the caller.
    """
    engine = shared_engine(base, "untrained", None, None, dtype)
    if engine.loaded.fingerprint != fingerprint:
        raise BaseModelError(
            f"a worker has other weights than this process for {base or 'the default base'!r} "
            f"({engine.loaded.fingerprint[:12]}, {fingerprint[:12]}); give every machine the same"
        )
    kv = ChunkKV.allocate(kv_shape(engine.base, kv_format), list(map(len, rows)))
    encode_chunks(engine.base, rows, lambda: None, kv)
    return [save({name: tensor.cpu().contiguous() for name, tensor in kv.get(row).items()}) for row in range(len(rows))]


def _batches(rows: dict[str, list[int]], device: str) -> list[dict[str, list[int]]]:
    """Put rows of like lengths together; the longest batches come last, and are taken first."""
    batches: list[dict[str, list[int]]] = []
    room = 0
    for key in sorted(rows, key=lambda one: len(rows[one])):
        room -= len(rows[key])
        if room < 0:
            batches.append({})
            room = _BATCH_TOKENS[device] - len(rows[key])
        batches[-1][key] = rows[key]
    return batches


def has_ray() -> bool:
    """Whether ray is installed."""
    return importlib.util.find_spec("ray") is not None


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError("--ray needs ray; install it: pip install 'focusllm[ray]'") from error
    module: ModuleType = ray
    return module
