"""Ask a folder of text files through a LangChain chain.

    python examples/langchain_chain.py FOLDER "Who signed the lease?"

Without arguments a few pages of Python's language reference are asked. Every file is read, none is chosen beforehand;
the answer is streamed and its sources follow.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from focus_integrations.langchain import FocusLLM

PAGES = ("break", "continue", "pass", "del", "while")


def main(folder: str, question: str) -> None:
    """Stream the answer, then name its sources."""
    llm = FocusLLM(documents=folder, template="question", max_tokens=32)
    chain = PromptTemplate.from_template("{question}") | llm | StrOutputParser()
    for piece in chain.stream({"question": question}):
        print(piece, end="", flush=True)
    print()
    for citation in llm.generate([question]).generations[0][0].generation_info["citations"]:
        where = citation["extras"]
        print(f"  {where['score']:.0%} {citation['title']} {where['source_start']}-{where['source_end']}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as place:
            for name in PAGES:
                (Path(place) / name).write_text(topics[name], encoding="utf-8")
            main(place, "Which statement terminates the nearest enclosing loop?")
