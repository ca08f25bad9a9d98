"""Ask a folder of files through LlamaIndex; read only what changed since the last time.

python examples/llama_index_directory.py QUESTION FOLDER [--index build/llama-index-folder]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_index.core import SimpleDirectoryReader

from focus_integrations.llama_index import FocusLLM, FocusMemoryIndex


def main() -> None:
    """Load or build the index, refresh it, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--index", type=Path, default=Path("build/llama-index-folder"))
    parser.add_argument("--model", help="base to use instead of the default one")
    parser.add_argument("--adapter")
    options = parser.parse_args()
    llm = FocusLLM(model=options.model, adapter=options.adapter)
    documents = SimpleDirectoryReader(str(options.folder), recursive=True, filename_as_id=True).load_data()
    known = (options.index / "focus_index.json").is_file()
    index = FocusMemoryIndex.load(options.index, llm) if known else FocusMemoryIndex(llm=llm)
    changed = index.refresh_ref_docs(documents)
    gone = set(index.ref_doc_info) - {document.id_ for document in documents}
    for name in gone:
        index.delete_ref_doc(name)
    index.persist(options.index)
    print(f"{sum(changed)} of {len(documents)} documents read, {len(gone)} removed, {len(index.memory)} chunks")
    response = index.as_query_engine(streaming=True, source_top_k=3).query(options.question)
    response.print_response_stream()
    print()
    for item in response.source_nodes:
        print(f"  {item.score:.2f} {item.node.metadata['file_name']}")


if __name__ == "__main__":
    main()
