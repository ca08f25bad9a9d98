"""Rank passages by the attention that a question puts on them, and read what another retriever found.

The scores are the ones an answer's citations have, so retrieval can be looked at, measured and combined with other
retrievers. Nothing is embedded: documents are read once, and each question runs one decoding step over all of them.
"""

from __future__ import annotations

import threading
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    BaseRunManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import Field

from focus_core.errors import ConfigError
from focus_core.generation import check_cancelled
from focus_core.method.attribution import Evidence
from focus_core.session import concurrency
from focus_core.session.arguments import refuse_unknown
from focus_core.session.engines import asked
from focus_core.text.corpus import Document as CoreDocument
from focus_integrations.langchain._model import CONFIG, FocusCorpus

IN_MEMORY = "(the documents are in memory)"


class FocusRetriever(FocusCorpus, BaseRetriever):
    """Passages with most attention for a question, best first.

    Its other parameters are those of :class:`~focus_integrations.langchain._model.FocusCorpus`; with ``retriever`` it
    ranks the passages of what that one finds.

    Example:
        >>> from focus_integrations.langchain import FocusRetriever
        >>> FocusRetriever(documents="contracts/", k=3).invoke("Who signed the lease?")  # doctest: +SKIP

    Args:
        k: passages to return.
        steps: tokens of an answer to listen to; 1 looks at the question alone.

    Raises:
        ConfigError: it was given nothing to read; what reads nothing (an empty memory, a filter that keeps nothing, an
            inner retriever that finds nothing) returns ``[]``.
    """

    model_config = CONFIG

    k: int = Field(default=4, ge=1)
    steps: int = Field(default=1, ge=1)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        return self._ranked(query, k, kwargs, threading.Event(), run_manager)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        return await concurrency.call(lambda cancelled: self._ranked(query, k, kwargs, cancelled, run_manager))

    def _ranked(
        self,
        query: str,
        k: int | None,
        kwargs: dict[str, Any],
        cancelled: threading.Event,
        run_manager: BaseRunManager,
    ) -> list[Document]:
        refuse_unknown(kwargs, ("documents", "memory", "memory_path", "memory_filter"), "option")
        engine = self._get_engine()
        found = self._find(query, run_manager)
        held = self._hold(engine, found, kwargs, lambda: check_cancelled(cancelled))
        if held.memory is None and self.retriever is None:
            raise ConfigError("a retriever needs something to read; give documents, memory, memory_path or retriever")
        if held.memory is None or not held.memory.chunks:
            return []
        stream = engine.stream(asked(engine, query), held.memory, max_tokens=self.steps, cancelled=cancelled)
        best = stream.answer.passages[: self.k if k is None else k]
        return [_passage(item, stream.documents[item.document_id]) for item in best]


def create_documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate[Any],
    *,
    document_variable_name: str = "context",
    output_parser: BaseOutputParser[Any] | None = None,
) -> Runnable[dict[str, Any], Any]:
    """Return a chain that takes documents and reads all of them; it replaces ``create_stuff_documents_chain``.

    Args:
        llm: a ``FocusLLM`` or ``ChatFocusLLM``, plain or bound.
        prompt: as for the stuffing chain; where it names the documents' variable, a note stands in their place.
        document_variable_name: key of the input that holds the documents.
        output_parser: reads the answer; text if not given.
    """
    parser = output_parser or StrOutputParser()

    def read(inputs: dict[str, Any]) -> Runnable[Any, Any]:
        documents = inputs.get(document_variable_name)
        if documents is None:
            raise ConfigError(f"the chain needs documents under {document_variable_name!r}; got {', '.join(inputs)}")
        bound: Any = llm
        noted: Runnable[Any, Any] = RunnableLambda(lambda given: {**given, document_variable_name: IN_MEMORY})
        chain: Runnable[Any, Any] = noted | prompt | bound.bind(documents=list(documents)) | parser
        return chain

    return RunnableLambda(read).with_config(run_name="focus_documents_chain")


def _passage(item: Evidence, document: CoreDocument) -> Document:
    own = document.metadata.get("start_index")  # of a piece that a splitter made: offsets are the whole text's
    first = own if isinstance(own, int) else 0
    facts = {
        "document_id": item.document_id,
        "score": item.score,
        "start_index": first + item.start,
        "end_index": first + item.end,
    }
    key = f"{item.document_id}:{item.start}-{item.end}"
    return Document(page_content=item.text, metadata={**document.metadata, **facts}, id=key)
