"""Put reading everything beside retrieve-then-read, on the same base and the same documents.

    python examples/langchain_compare.py

The retriever picks two passages by the words they share with the question, and the base reads them in its prompt; the
other chain reads every page from memory. A handful of questions shows how the two are used, not which one is better:
that is what ``focusllm eval`` is for.
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever

from focus_integrations.langchain import FocusLLM, FocusTextSplitter

PAGES = ("break", "continue", "pass", "del", "while")
QUESTIONS = ("Which statement terminates the nearest enclosing loop?", "Which statement does nothing when executed?")


class Keywords(BaseRetriever):
    """Passages that share most words with the question."""

    pages: list[Document]
    k: int = 2

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        wanted = set(re.findall(r"\w+", query.lower()))
        return sorted(self.pages, key=lambda page: -len(wanted & set(re.findall(r"\w+", page.page_content.lower()))))[
            : self.k
        ]


def main() -> list[tuple[str, str]]:
    """Answer each question both ways and return the pairs."""
    pages = [Document(page_content=topics[name], metadata={"source": name}) for name in PAGES]
    everything = FocusLLM(documents=pages, template="question", max_tokens=32)
    retriever = Keywords(pages=FocusTextSplitter(256).split_documents(pages))
    stuffed = PromptTemplate.from_template("{context}\n\n{question}") | FocusLLM(template="question", max_tokens=32)
    found = []
    for question in QUESTIONS:
        context = "\n\n".join(page.page_content for page in retriever.invoke(question))
        pair = (
            everything.invoke(question),
            (stuffed | StrOutputParser()).invoke({"context": context, "question": question}),
        )
        print(f"> {question}\n  all pages in memory: {pair[0]}\n  two passages found:  {pair[1]}")
        found.append(pair)
    return found


if __name__ == "__main__":
    main()
