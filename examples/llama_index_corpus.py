"""Index Python's language reference as memory, keep it, and ask in another process; print what each step costs.

    python examples/llama_index_corpus.py build  [--dir build/llama-index]   # read and persist
    python examples/llama_index_corpus.py ask    [--dir build/llama-index]   # load, ask, add, remove, ask again
    python examples/llama_index_corpus.py                                    # both, the second in a process of its own

The corpus is ``pydoc_data.topics``, which every Python installation has: about 79 documents.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

from llama_index.core import Document

from focus_integrations.llama_index import FocusLLM, FocusMemoryIndex

QUESTION = "Which statement is used to raise an exception?"
NEWS = Document(
    text="The frobnicate statement was added in Python 9.1. It is written as `frobnicate NAME`.\n" * 3,
    doc_id="frobnicate",
    metadata={"topic": "frobnicate"},
)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what was done and how long it took."""
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:8.1f} s  {what}", flush=True)


def corpus(limit: int | None = None) -> list[Document]:
    """Return one document a topic, the first ``limit`` of them."""
    pages = [Document(text=text, doc_id=name, metadata={"topic": name}) for name, text in sorted(topics.items())]
    return pages[:limit]


def ask(index: FocusMemoryIndex, question: str) -> None:
    """Ask, and print the answer with its best sources."""
    with timed(f"asked over {len(index.memory)} chunks"):
        response = index.as_query_engine(source_top_k=3, max_tokens=24).query(question)
    sources = ", ".join(f"{item.node.metadata['topic']} {item.score:.2f}" for item in response.source_nodes)
    print(f"            {question}\n            {str(response)!r}  [{sources}]")


def build(llm: FocusLLM, folder: Path, limit: int | None) -> None:
    """Read the corpus and write the index."""
    with timed("loaded the model"):
        _ = llm.engine
    documents = corpus(limit)
    with timed(f"read {len(documents)} documents"):
        kept = folder / "focus_memory" / "kv"  # where persist puts chunk KV: a build that is stopped resumes
        index = FocusMemoryIndex.from_documents(documents, llm=llm, store=kept, show_progress=sys.stderr.isatty())
    with timed(
        f"wrote {index.memory.tokens} tokens in {len(index.nodes)} nodes, {index.memory.nbytes / 2**20:.0f} MiB"
    ):
        index.persist(folder)


def use(llm: FocusLLM, folder: Path, limit: int | None) -> None:
    """Load the index, ask, add a document, remove one, ask again, refresh."""
    with timed("loaded the model"):
        _ = llm.engine
    with timed("loaded the index"):
        index = FocusMemoryIndex.load(folder, llm)
    ask(index, QUESTION)
    with timed("added a document"):
        index.insert(NEWS)
    ask(index, "In which version was the frobnicate statement added?")
    with timed("removed a document"):
        index.delete_ref_doc("frobnicate")
    ask(index, QUESTION)
    with timed("compared all documents by hash"):
        changed = index.refresh_ref_docs(corpus(limit))
    print(f"            {sum(changed)} of {len(changed)} documents had changed")
    with timed("wrote what was new"):
        index.persist(folder)


def main() -> None:
    """Run the step that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=["build", "ask"])
    parser.add_argument("--dir", type=Path, default=Path("build/llama-index"))
    parser.add_argument("--model", help="base to use instead of the default one")
    parser.add_argument("--adapter")
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--limit", type=int, help="documents to read; all if not given")
    options = parser.parse_args()
    if options.step is None:
        for step in ("build", "ask"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], step], check=True)
        return
    llm = FocusLLM(model=options.model, adapter=options.adapter, chunk_size=options.chunk_size)
    (build if options.step == "build" else use)(llm, options.dir, options.limit)


if __name__ == "__main__":
    main()
