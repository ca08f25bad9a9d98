"""Draw which chunk each word of an answer attended to (arXiv 2408.11745, Fig. 7 and 8).

    python examples/attention_heatmaps.py build/heatmaps

A passkey in repeated sentences, where one chunk alone matters, and a question over a few topics of Python's language
reference. Every chunk stays in front of every word (``chunk_top_p=1``), so nothing is hidden from the picture.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

from focus_core import Document, FocusEngine
from focus_core.evaluation.tasks.passkey import passkey
from focus_core.method.attribution import save_heatmap

TOPICS = ("assert", "break", "continue", "del", "for", "global", "if", "import", "pass", "raise", "return", "while")


def main(folder: Path) -> None:
    """Write two images."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = FocusEngine.from_pretrained()
    trial = list(passkey(engine.tokenizer, 4000, 5))[-1]
    draw(engine, trial.documents, trial.question, "raw", folder / "passkey.png")
    documents = [Document(name, topics[name]) for name in TOPICS]
    question = "Which statement terminates the nearest enclosing loop?"
    draw(engine, documents, question, "question", folder / "question.png")


def draw(engine: FocusEngine, documents: list[Document], question: str, template: str, image: Path) -> None:
    """Ask, and draw the attention on every candidate at every token of the answer."""
    memory = engine.remember(documents)
    answer = engine.answer(question, memory, template=template, max_tokens=16, chunk_top_p=1.0)
    labels = [f"{chunk.document_id}:{chunk.start}" for chunk in memory.chunks]
    words = [engine.tokenizer.decode([token.id]) or "(end)" for token in answer.tokens]
    save_heatmap(answer.attention, words, labels, image)
    print(f"{question} -> {answer.text}\n{image}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/heatmaps"))
