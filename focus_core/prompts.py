"""Turn questions and conversations of any length into what the local rows read, and the rest into documents for memory.

It knows one adapter's wording and window; nothing is run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from focus_core.config import FocusConfig
from focus_core.model.chat import Message, Tool, fit_messages, render_messages, with_system
from focus_core.model.hub import AdapterInfo
from focus_core.text.chunking import PARAGRAPH
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer

Template = Literal["question", "chat", "raw"]
_ANY = "?"  # a question, to see what all questions begin with


@dataclass(frozen=True)
class Prompts:
    """How one engine puts questions.

    Args:
        tokenizer: the base's.
        config: the window.
        info: the adapter's wording.
    """

    tokenizer: TextTokenizer
    config: FocusConfig
    info: AdapterInfo

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the adapter's system turn in front of a conversation that has none, where the base knows turns."""
        return with_system(self.tokenizer, messages, self.info.system)

    def fit(
        self, messages: Sequence[Message], tools: Sequence[Tool], max_tokens: int
    ) -> tuple[list[Document], list[Message]]:
        """Split a conversation into documents for memory and the messages that fit the window with an answer.

        The adapter's system turn is put in front where there is none. Fitting twice changes nothing.
        """
        messages = self.with_system(messages)
        room = self.config.window - max_tokens - 1

        def count(some: Sequence[Message]) -> int:
            return len(render_messages(self.tokenizer, some, tools))

        if not messages:
            return [], []
        return fit_messages(messages, count, room, self.split_prompt, self.info.earlier_tokens or None)

    def local_ids(self, text: str, template: Template = "question") -> list[int]:
        """Return the token ids that the local row is made of."""
        if template == "raw":
            return self.tokenizer.encode(text)
        question = self.info.question_template.replace("{question}", text) if template == "question" else text
        return render_messages(self.tokenizer, [Message("user", question)], system=self.info.system)

    def split_prompt(self, text: str, whole: int | None = None) -> tuple[str, str]:
        """Split a prompt of any length into (head, tail): the head is to become memory, the tail stays local.

        A prompt of at most ``whole`` tokens, half of the window if not given, stays whole. The tail begins at a
        paragraph where it can and is no longer than the dynamic prompt, so every chunk sees all of it.
        """
        encoded = self.tokenizer.encode_with_offsets(text)
        count = len(encoded.ids)
        if count <= max(1, self.config.window // 2 if whole is None else whole):  # one token has no head
            return "", text
        first = count - max(1, min(self.config.prompt_length, count) * 3 // 4)
        cut = int(encoded.starts[first])
        paragraph = PARAGRAPH.search(text, cut)
        better = paragraph.start() if paragraph else -1
        if better < 0 or len(text) - better < 16:
            better = text.find("\n", cut)
        if 0 <= better < len(text) - 16:
            cut = better + 1
        return text[:cut], text[cut:].lstrip("\r\n")

    def opening(self, local: Sequence[int], template: Template) -> int:
        """Return how many of a question's first tokens all questions of the template begin with."""
        return _shared_tokens(local, self.local_ids(_ANY, template))

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[int], int]:
        """Return a conversation's token ids and how many of them others of its system turn and tools begin with."""
        local = render_messages(self.tokenizer, messages, tools)
        first = next((message for message in messages if message.role != "system"), None)
        answer = first is not None and first.role == "assistant"
        another = [message for message in messages[:1] if message.role == "system"]
        another.append(Message("assistant" if answer else "user", _ANY))
        return local, _shared_tokens(local, render_messages(self.tokenizer, another, tools))


def _shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
