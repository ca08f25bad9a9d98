"""Describe what an invented example holds before it is cut into tokens: documents and what is asked about them.

The forms, conversations and pairs of documents that training draws are all scenes; the module draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A question about a scene.

    Args:
        question: the last user turn.
        answer: in a few words.
        sentence: the same as a whole sentence; empty where there is none.
        clues: pieces of text that a chunk must hold to be a gold one, each in some document; empty says that no
            document holds the answer.
        about: words that together name what is asked for; another document that holds all of them would answer too.
        turns: what was said before in the local context, user and assistant by turns.
        chat: a turn of a conversation, which no answer template is put around.
    """

    question: str
    answer: str = ""
    sentence: str = ""
    clues: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Scene:
    """Documents of a memory, in its order, and questions about them."""

    documents: tuple[str, ...]
    asked: tuple[Asked, ...]
