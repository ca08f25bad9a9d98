"""Write the topics of Python's language reference to a folder: a real corpus that every Python carries.

    python examples/python_reference.py build/python-reference
    focusllm ask "Which statement is used to raise an exception?" build/python-reference

79 documents, 465,000 characters, from the standard library's ``pydoc_data.topics``.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def main(folder: Path) -> None:
    """Write one text file a topic."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{len(topics)} topics in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/python-reference"))
