"""Answer ``/v1/memories``: create, list, fill and drop named memories, with the progress of indexing as events."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, UploadFile
from starlette.responses import JSONResponse, Response

from focus_core.errors import CancelledError
from focus_core.generation import check_cancelled
from focus_core.server.access import Caller
from focus_core.server.errors import ApiError, error_body, translate
from focus_core.server.http import Reader, Writer, event_stream
from focus_core.server.memories import Keeping, Memories
from focus_core.server.metrics import Metrics
from focus_core.server.schemas import DocumentsUpload, MemoryChange, MemoryCreate
from focus_core.store.collections import CollectionInfo
from focus_core.text.corpus import Document, document_of

_KEPT = 256  # finished changes whose progress can still be asked for


@dataclass
class Indexing:
    """A change of a memory that is being made.

    Args:
        id: names it.
        tenant: whose it is.
        memory: name of the memory.
        documents: how many are read.
        done, total: tokens.
        status: ``queued``, ``in_progress``, ``completed``, ``failed`` or ``cancelled``.
        error: OpenAI's error object, of a failed one.
    """

    id: str
    tenant: str
    memory: str
    documents: int
    done: int = 0
    total: int = 0
    status: str = "queued"
    error: dict[str, Any] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def body(self) -> dict[str, Any]:
        """Return it as JSON."""
        shown = {name: getattr(self, name) for name in ("id", "memory", "documents", "status", "error")}
        return {"object": "memory.indexing", **shown, "tokens_done": self.done, "tokens_total": self.total}


class Indexer:
    """Makes changes of memories one after the other, beside the event loop, and remembers how far each is."""

    def __init__(self, memories: Memories, metrics: Metrics) -> None:
        self.memories, self.metrics = memories, metrics
        self.changes: OrderedDict[str, Indexing] = OrderedDict()
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, tenant: str, name: str, documents: Sequence[Document]) -> Indexing:
        """Start reading documents into a memory."""
        change = Indexing(f"idx_{uuid.uuid4().hex}", tenant, name, len(documents))
        self.changes[change.id] = change
        while len(self.changes) > _KEPT:
            self.changes.popitem(last=False)
        task = asyncio.create_task(self._run(change, documents))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return change

    async def close(self, grace: float) -> None:
        """Let running changes end within ``grace`` seconds, else stop them; a stopped one has changed nothing."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for change in self.changes.values():
            change.cancelled.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, change: Indexing, documents: Sequence[Document]) -> None:
        def progress(done: int, total: int) -> None:
            change.done, change.total = done, total

        try:
            async with self._one:
                check_cancelled(change.cancelled)
                change.status = "in_progress"
                await asyncio.to_thread(
                    self.memories.update,
                    change.tenant,
                    change.memory,
                    documents,
                    (),
                    progress,
                    lambda: check_cancelled(change.cancelled),
                )
            self.metrics.read(len(documents))
            change.status = "completed"
        except CancelledError:
            change.status = "cancelled"
        except Exception as error:
            change.error, change.status = error_body(translate(error))["error"], "failed"


def memories_router(memories: Memories, indexer: Indexer, document_bytes: int) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1/memories", tags=["Memories"])

    @router.get("")
    async def every(caller: Reader) -> dict[str, Any]:
        """List the caller's memories."""
        found = await asyncio.to_thread(memories.list, caller.tenant)
        return {"object": "list", "data": [_body(*one) for one in found]}

    @router.post("", status_code=201)
    async def create(body: MemoryCreate, caller: Writer) -> dict[str, Any]:
        """Make an empty memory."""
        return _body(*await asyncio.to_thread(memories.create, caller.tenant, body.name, body.pinned, body.ttl_seconds))

    @router.get("/{name}")
    async def one(name: str, caller: Reader) -> dict[str, Any]:
        """Describe a memory."""
        return _body(*await asyncio.to_thread(memories.require, caller.tenant, name))

    @router.patch("/{name}")
    async def change(name: str, body: MemoryChange, caller: Writer) -> dict[str, Any]:
        """Pin a memory, or give it a time to live."""
        given = body.model_dump(exclude_unset=True)
        return _body(*await asyncio.to_thread(memories.keep, caller.tenant, name, given))

    @router.delete("/{name}")
    async def drop(name: str, caller: Writer) -> dict[str, Any]:
        """Remove a memory with all its documents."""
        await asyncio.to_thread(memories.drop, caller.tenant, name)
        return {"object": "memory.deleted", "name": name, "deleted": True}

    @router.get("/{name}/documents")
    async def documents(name: str, caller: Reader) -> dict[str, Any]:
        """List a memory's documents, without their texts."""
        found = await asyncio.to_thread(memories.documents, caller.tenant, name)
        return {"object": "list", "data": [_document(document) for document in found.values()]}

    @router.post("/{name}/documents", status_code=202)
    async def add(name: str, body: DocumentsUpload, caller: Writer) -> dict[str, Any]:
        """Read documents into a memory; the answer names the change whose progress can be followed."""
        found = [Document(item.id, item.text, item.metadata) for item in body.documents]
        return await _begin(caller, name, found)

    @router.post("/{name}/files", status_code=202)
    async def upload(name: str, files: list[UploadFile], caller: Writer) -> dict[str, Any]:
        """Read uploaded files into a memory, each a document named as the file."""
        return await _begin(caller, name, [await _file(file, document_bytes) for file in files])

    async def _begin(caller: Caller, name: str, found: Sequence[Document]) -> dict[str, Any]:
        await asyncio.to_thread(memories.check, caller.tenant, name)
        names = Counter(document.id for document in found)
        twice = next((key for key, count in names.items() if count > 1), None)
        if twice is not None:
            raise ApiError(400, f"two documents are named {twice!r}; rename one", param="documents")
        for document in found:
            if len(document.text) > document_bytes:
                raise ApiError(
                    413, f"document {document.id!r} is larger than {document_bytes:,} bytes; cut it", code="too_large"
                )
            if not document.text.strip():
                raise ApiError(400, f"document {document.id!r} is empty; leave it out", param="documents")
        return indexer.begin(caller.tenant, name, found).body()

    @router.get("/{name}/document")
    async def document(name: str, id: Annotated[str, Query()], caller: Reader) -> dict[str, Any]:
        """Return one document with its text."""
        found = await asyncio.to_thread(memories.document, caller.tenant, name, id)
        return {**_document(found), "text": found.text}

    @router.delete("/{name}/document")
    async def remove(name: str, id: Annotated[str, Query()], caller: Writer) -> dict[str, Any]:
        """Take one document out of a memory."""
        await asyncio.to_thread(memories.update, caller.tenant, name, (), [id], lambda done, total: None, lambda: None)
        return {"object": "memory.document.deleted", "id": id, "deleted": True}

    @router.get("/{name}/indexing/{key}")
    async def progress(name: str, key: str, caller: Reader) -> Response:
        """Say how far a change is."""
        return JSONResponse(_find(indexer, caller, name, key).body())

    @router.delete("/{name}/indexing/{key}")
    async def stop(name: str, key: str, caller: Writer) -> dict[str, Any]:
        """Stop a change; the memory is as before."""
        found = _find(indexer, caller, name, key)
        found.cancelled.set()
        return found.body()

    @router.get("/{name}/indexing/{key}/events")
    async def follow(name: str, key: str, request: Request, caller: Reader) -> Response:
        """Stream how far a change is, until it has ended."""
        return event_stream(request, _events(_find(indexer, caller, name, key)))

    return router


def _find(indexer: Indexer, caller: Caller, name: str, key: str) -> Indexing:
    found = indexer.changes.get(key)
    if found is None or found.tenant != caller.tenant or found.memory != name:
        raise ApiError(404, f"there is no change {key!r} of memory {name!r}", code="indexing_not_found")
    return found


async def _events(change: Indexing) -> AsyncIterator[str]:
    shown: dict[str, Any] = {}
    while True:
        body = change.body()
        if body != shown:
            shown = body
            yield json.dumps(body, ensure_ascii=False)
        if body["status"] not in ("queued", "in_progress"):
            return
        await asyncio.sleep(0.1)


async def _file(file: UploadFile, most: int) -> Document:
    data = await file.read(most + 1)
    name = file.filename or "file"
    if len(data) > most:
        raise ApiError(413, f"file {name!r} is larger than {most:,} bytes; cut it", code="too_large")
    return await asyncio.to_thread(document_of, name, data)


def _body(info: CollectionInfo, keeping: Keeping) -> dict[str, Any]:
    return {
        "object": "memory",
        "name": info.name,
        "documents": info.documents,
        "chunks": info.chunks,
        "bytes": info.nbytes,
        "version": info.version,
        "changed_at": round(info.changed, 3),
        "pinned": keeping.pinned,
        "ttl_seconds": keeping.ttl,
        "created_at": round(keeping.created, 3),
        "used_at": round(keeping.used, 3),
    }


def _document(document: Document) -> dict[str, Any]:
    return {"object": "memory.document", "id": document.id, "metadata": document.metadata}
