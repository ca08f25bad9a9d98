"""Keep a corpus as memory under LlamaIndex's index interface: build, insert, delete, update, refresh, persist, load.

One node is one document of the memory, so any of them comes and goes without touching the rest. Nothing is embedded,
and nothing is chosen before the question is read. LlamaIndex's own ``load_index_from_storage`` knows a closed list of
index classes and would give a SummaryIndex over the same nodes; use :meth:`FocusMemoryIndex.load`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.data_structs.data_structs import IndexList
from llama_index.core.indices.base import BaseIndex
from llama_index.core.llms.utils import LLMType
from llama_index.core.schema import BaseNode, Document, MetadataMode, TransformComponent
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.storage.storage_context import StorageContext
from llama_index_instrumentation import get_dispatcher
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from focus_core.errors import ConfigError, StoreError
from focus_core.files import is_store, write_atomically
from focus_core.store.database import Store
from focus_core.store.memory import Memory, Progress
from focus_core.store.migration import DEFAULT_NAME
from focus_integrations.llama_index._nodes import to_documents
from focus_integrations.llama_index.chat_engine import chat_engine
from focus_integrations.llama_index.events import FocusPrefillEvent
from focus_integrations.llama_index.llm import FocusLLM
from focus_integrations.llama_index.node_parser import FocusNodeParser, hashable
from focus_integrations.llama_index.query_engine import query_engine
from focus_integrations.llama_index.retriever import FocusRetriever

FORMAT = 2
MANIFEST = "focus_index.json"
MEMORY = "focus_memory"
_CHECKED = ("docstore.json", "index_store.json")

dispatcher = get_dispatcher(__name__)


class FocusMemoryIndex(BaseIndex[IndexList]):
    """An index whose every node can influence every answer.

    Example:
        >>> index = FocusMemoryIndex.from_documents(documents, llm=FocusLLM())  # doctest: +SKIP
        >>> index.as_query_engine().query("Who signed the lease?")  # doctest: +SKIP

    Args:
        nodes: to read now; each is one document of the memory.
        llm: model that reads; the default one if not given. ``Settings.llm`` is never asked.
        store: folder that keeps chunk KV while it is computed, so that a stopped run resumes (see ``FocusPrefill``).
        metadata_mode: which metadata stands in front of a node's text.
        progress: called with tokens done and to do.
        memory: a core memory to read nodes into; one of its own if not given.
        show_progress: draw a bar instead.
        **values: those of LlamaIndex's ``BaseIndex``: ``storage_context``, ``transformations``, ``callback_manager``.

    Raises:
        OutOfMemoryError: the chunk KV does not fit.
    """

    index_struct_cls = IndexList

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        llm: FocusLLM | None = None,
        store: str | Path | None = None,
        metadata_mode: MetadataMode = MetadataMode.LLM,
        progress: Progress | None = None,
        memory: Memory | None = None,
        show_progress: bool = False,
        transformations: list[TransformComponent] | None = None,
        **values: Any,
    ) -> None:
        self.llm = llm or FocusLLM()
        self.metadata_mode = metadata_mode
        self.progress = progress
        if memory is None:
            memory = Memory(self.llm.engine.encoder, Store(store) if store is not None else None)
        self.memory = memory
        if nodes is None and values.get("index_struct") is None:
            nodes = []
        super().__init__(
            nodes=nodes,
            show_progress=show_progress,
            transformations=transformations or [FocusNodeParser.from_defaults(llm=self.llm)],
            **values,
        )

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        storage_context: StorageContext | None = None,
        show_progress: bool = False,
        callback_manager: CallbackManager | None = None,
        transformations: list[TransformComponent] | None = None,
        **values: Any,
    ) -> Self:
        """Cut documents into nodes and read them.

        Args:
            documents: LlamaIndex documents; those without text are left out and logged.
            storage_context: where nodes are kept; in memory if not given.
            show_progress: draw bars.
            callback_manager: of the index.
            transformations: what makes nodes of documents; ``FocusNodeParser`` if not given.
            **values: for the constructor.
        """
        values["llm"] = values.get("llm") or FocusLLM()
        return super().from_documents(
            list(map(hashable, documents)),
            storage_context=storage_context,
            show_progress=show_progress,
            callback_manager=callback_manager,
            transformations=transformations or [FocusNodeParser.from_defaults(llm=values["llm"])],
            **values,
        )

    def __copy__(self) -> Self:
        """Return another index over the same nodes and memory."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or copied deeply, alone or inside an engine: chunk KV is no part of a pickle."""
        raise ConfigError(
            "an index is not pickled or copied deeply; persist it to a folder, and load it where it is needed"
        )

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[BaseNode]:
        """Nodes in memory, in order of addition."""
        return self.docstore.get_nodes(self.index_struct.nodes)

    def node(self, node_id: str) -> BaseNode | None:
        """Return a node, or ``None`` where the id is unknown."""
        found = self.docstore.get_document(node_id, raise_error=False)
        return found if isinstance(found, BaseNode) else None

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """Nodes and metadata of each document that nodes in memory come from."""
        found = {}
        for node in self.nodes:
            name = node.ref_doc_id
            info = self.docstore.get_ref_doc_info(name) if name and name not in found else None
            if name and info:
                found[name] = info
        return found

    # -- changing -----------------------------------------------------------------------------------------------

    def _build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> IndexList:
        struct = IndexList()
        self._remember(nodes, struct)
        return struct

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        self._remember(nodes, self.index_struct)

    def _remember(self, nodes: Sequence[BaseNode], struct: IndexList) -> None:
        documents = to_documents(nodes, self.metadata_mode)
        with tqdm(total=0, unit="token", desc="Reading", disable=not self._show_progress) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)
                dispatcher.event(FocusPrefillEvent(done=done, total=total))
                if self.progress is not None:
                    self.progress(done, total)

            self.memory.add(documents, progress=report)
        known = set(struct.nodes)
        struct.nodes.extend(document.id for document in documents if document.id not in known)

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Cut a document into nodes and read them."""
        super().insert(hashable(document), **insert_kwargs)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """Cut a document into nodes and read them without blocking the event loop."""
        await super().ainsert(hashable(document), **insert_kwargs)

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Read the documents that are new or changed; returns which were."""
        return super().refresh_ref_docs(list(map(hashable, documents)), **update_kwargs)

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Read the documents that are new or changed without blocking the event loop; returns which were."""
        return await super().arefresh_ref_docs(list(map(hashable, documents)), **update_kwargs)

    async def ainsert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Insert nodes without blocking the event loop."""
        await asyncio.to_thread(self.insert_nodes, nodes, **insert_kwargs)

    def _delete_node(self, node_id: str, **delete_kwargs: Any) -> None:
        self._forget([node_id])

    def _forget(self, node_ids: Sequence[str]) -> None:
        gone = set(node_ids)
        self.memory.remove([node_id for node_id in dict.fromkeys(node_ids) if node_id in self.memory])
        self.index_struct.nodes = [node_id for node_id in self.index_struct.nodes if node_id not in gone]

    def delete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Forget nodes, all in one change of the memory; unknown ids are passed over."""
        self._forget(node_ids)
        super().delete_nodes([], **delete_kwargs)
        if delete_from_docstore:
            for node_id in node_ids:
                self.docstore.delete_document(node_id, raise_error=False)

    async def adelete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """Forget nodes without blocking the event loop."""
        await asyncio.to_thread(self.delete_nodes, node_ids, delete_from_docstore, **delete_kwargs)

    def delete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = True, **delete_kwargs: Any) -> None:
        """Forget a document.

        Args:
            ref_doc_id: id of the document; an unknown one is logged and nothing happens.
            delete_from_docstore: also drop its nodes and its hash (LlamaIndex's indices keep them by default, and then
                a later refresh takes the document for unchanged and does not bring it back).
            **delete_kwargs: unused.
        """
        super().delete_ref_doc(ref_doc_id, delete_from_docstore=delete_from_docstore, **delete_kwargs)

    async def adelete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = True, **delete_kwargs: Any) -> None:
        """Forget a document without blocking the event loop; see :meth:`delete_ref_doc`."""
        await super().adelete_ref_doc(ref_doc_id, delete_from_docstore=delete_from_docstore, **delete_kwargs)

    # -- asking -------------------------------------------------------------------------------------------------

    def as_retriever(self, **values: Any) -> BaseRetriever:
        """Return a :class:`FocusRetriever`; takes its arguments."""
        return FocusRetriever(self, **values)

    def as_query_engine(self, llm: LLMType | None = None, **values: Any) -> BaseQueryEngine:
        """Return a :class:`FocusQueryEngine`; takes its arguments.

        With an ``llm`` that is no ``FocusLLM``, nodes are ranked by attention and that model reads the best of them.
        LlamaIndex's own arguments (``similarity_top_k``, ``node_postprocessors``, ``response_mode``, templates) work as
        in every index: nodes are chosen first.

        Raises:
            ConfigError: an argument is unknown.
        """
        return query_engine(self, llm, values)

    def as_chat_engine(
        self, chat_mode: ChatMode = ChatMode.BEST, llm: LLMType | None = None, **values: Any
    ) -> BaseChatEngine:
        """Return a conversation over the whole memory.

        Args:
            chat_mode: ``best`` and ``context`` give a :class:`FocusChatEngine`; ``condense_question``,
                ``condense_plus_context`` and ``simple`` give LlamaIndex's engines over this index.
            llm: the index's if not given; one that is no ``FocusLLM`` reads the nodes that attention ranks first.
            **values: arguments of the engine; ``filters`` and ``doc_ids`` in every mode.

        Raises:
            ConfigError: an argument is unknown, or LlamaIndex has no such chat engine any more.
        """
        return chat_engine(self, chat_mode, llm, values)

    # -- persistence --------------------------------------------------------------------------------------------

    def persist(self, persist_dir: str | Path, progress: Progress = lambda done, total: None) -> None:
        """Write nodes, index and chunk KV to a folder; writing again adds only what is new.

        The manifest comes last, with the checksums of what it belongs to: a folder that was not written to its end is
        refused by :meth:`load`. Files that are not the index's stay as they are.

        Args:
            persist_dir: created if absent.
            progress: called with tokens done and to do.
        """
        folder = Path(persist_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._storage_context.persist(folder)
        store = Store(folder / MEMORY)
        self.memory.save(store, progress, replace=True)
        manifest = {
            "format": FORMAT,
            "index_id": self.index_id,
            "metadata_mode": self.metadata_mode.value,
            "memory": store.collection(DEFAULT_NAME).digest,
            "files": {name: _digest(folder / name) for name in _CHECKED if (folder / name).is_file()},
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    @classmethod
    def load(
        cls,
        persist_dir: str | Path,
        llm: FocusLLM | None = None,
        *,
        storage_context: StorageContext | None = None,
        load_progress: Progress = lambda done, total: None,
        **values: Any,
    ) -> Self:
        """Read what :meth:`persist` wrote; nothing is computed.

        Args:
            persist_dir: the folder.
            llm: the model that read the documents.
            storage_context: where nodes are, if they are not in the folder (a database).
            load_progress: called with tokens done and to do.
            **values: for the constructor.

        Raises:
            StoreError: there is no index, it was not written to its end, it is damaged, or it is another model's.
        """
        folder, llm = Path(persist_dir), llm or FocusLLM()
        manifest = _manifest(folder)
        store = Store(folder / MEMORY, read_only=True)
        if manifest["format"] > 1 and store.collection(DEFAULT_NAME).digest != manifest["memory"]:
            raise StoreError(f"{folder / MEMORY} is not the one that was persisted; persist the index again")
        memory = Memory.load(store, llm.engine.encoder, load_progress)
        try:
            context = storage_context or StorageContext.from_defaults(persist_dir=str(folder))
            struct = context.index_store.get_index_struct(manifest["index_id"])
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{folder} is damaged ({error}); build the index again") from error
        held = {document.id for document in memory.documents}
        if not isinstance(struct, IndexList) or set(struct.nodes) != held:
            raise StoreError(f"nodes and memory of {folder} do not belong together; build the index again")
        mode = MetadataMode(manifest["metadata_mode"])
        return cls(llm=llm, memory=memory, index_struct=struct, storage_context=context, metadata_mode=mode, **values)


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a persisted index after checking that all of it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        state = "was not written to its end, or by another index class" if folder.is_dir() else "does not exist"
        raise StoreError(f"no index in {folder}: it {state} ({MANIFEST} is missing); persist the index there first")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        files, found = dict(manifest["files"]), manifest["format"]
        manifest["index_id"], manifest["metadata_mode"], manifest["memory" if found == FORMAT else "files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}); persist the index again") from error
    if found not in (1, FORMAT):
        raise StoreError(f"{path} has format {found!r}, this version reads {FORMAT}; build the index again")
    for name, digest in files.items():
        if found == 1 and name == f"{MEMORY}/memory.json" and is_store(folder / MEMORY):
            continue  # checked when it is brought to this version's form
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise StoreError(f"{folder / name} is missing or not the one that was persisted; persist the index again")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
