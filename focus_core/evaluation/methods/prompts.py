"""Put a question to the base in the words that suit it: the prompts that baselines are tried with.

Which one is best is chosen on questions that no table uses (docs/evaluation.md); the adapter's own words stay among
them, so that both can be measured. Worked examples are invented, so no data set is in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.evaluation.trial import Trial
from focus_core.model.chat import Message, render_messages

_EXAMPLES = (
    (
        "Harlow Ferry\nThe ferry at Harlow was opened in 1911 by the engineer Ada Pryce. It carries up to ninety "
        "passengers and crosses the Teel in six minutes.",
        "who opened the ferry at harlow",
        "Ada Pryce",
    ),
    (
        "Quillon beetle\nThe quillon beetle lives in oak bark in the north of the island. Adults are green and feed on "
        "lichen, while the grubs eat rotten wood.",
        "what do adult quillon beetles feed on",
        "lichen",
    ),
    (
        "Marrow Cup\nThe Marrow Cup is a rowing race held each May. Dunmore won it for the first time in 1987, beating "
        "Castle Reach by two lengths.",
        "when did dunmore first win the marrow cup",
        "1987",
    ),
)


@dataclass(frozen=True)
class Prompt:
    """A way to put a question over a text.

    Args:
        ask: the user's turn; ``{text}`` and ``{question}`` stand for what they say.
        system: system turn; ``None`` leaves the template's own.
        shots: worked examples in front.
        chat: turns in the base's chat template; otherwise text to go on with.
        stop: text that ends the answer.
    """

    ask: str
    system: str | None = None
    shots: int = 0
    chat: bool = True
    stop: str | None = None

    def ids(self, engine: FocusEngine, text: str, question: str) -> list[int]:
        """Return the token ids of a question over ``text``, which may be empty."""
        pairs = [(self.fill(shown, asked), answer) for shown, asked, answer in _EXAMPLES[: self.shots]]
        last = self.fill(text, question)
        if not self.chat:
            return engine.tokenizer.encode("\n\n".join([*(f"{ask} {answer}" for ask, answer in pairs), last]))
        turns = [] if self.system is None else [Message("system", self.system)]
        for ask, answer in pairs:
            turns += [Message("user", ask), Message("assistant", answer)]
        return render_messages(engine.tokenizer, [*turns, Message("user", last)])

    def fill(self, text: str, question: str) -> str:
        """Return the user's turn."""
        ask = self.ask if text else self.ask.replace("{text}\n\n", "").replace("Passage: {text}\n", "")
        return re.sub(r"\{(text|question)\}", lambda found: text if found[1] == "text" else question, ask)


_BRIEF = "{text}\n\nQuestion: {question}\nGive only the answer, in a few words."
_CARD = "Passage: {text}\nQuestion: {question}\nAnswer:"
OWN = "own"
BEST = "brief"
LONG = "plain"
OR_NOT = "brief-or-not"
PROMPTS: dict[str, Prompt] = {
    "plain": Prompt("{text}\n\n{question}"),
    "brief": Prompt(_BRIEF),
    "brief-system": Prompt(_BRIEF, "You answer questions about a text with a few words taken from it."),
    "brief-documents": Prompt(_BRIEF, "Use the documents."),
    "only": Prompt(
        "Answer the question with a short phrase from the text below and write nothing else.\n\n{text}\n\n"
        "Question: {question}"
    ),
    "name": Prompt("{text}\n\n{question}\nAnswer with the name, date, number or phrase only."),
    "results": Prompt(
        "Write a high-quality answer for the given question using only the provided search results.\n\n{text}\n\n"
        "Question: {question}\nAnswer:"
    ),
    "brief-or-not": Prompt(_BRIEF + ' If the text does not hold the answer, write "Not found."'),
    "shots": Prompt(_BRIEF, shots=3),
    "card": Prompt(_CARD, chat=False, stop="\n"),
    "card-shots": Prompt(_CARD, shots=3, chat=False, stop="\n"),
}
"""By name. ``own``, not listed, is the adapter's question template in the base's template."""


def find_prompt(engine: FocusEngine, name: str | None, trial: Trial) -> Prompt:
    """Return a prompt by name; without a name the best one, or a plain one where a long answer is wanted.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None and trial.absent is not None:
        name = OR_NOT
    if name is None:
        name = LONG if trial.measure is not None and trial.measure.name == "rouge-l" else BEST
    if name == OWN:
        return Prompt("{text}\n\n" + engine.info.question_template)
    if name not in PROMPTS:
        raise ConfigError(f"unknown prompt {name!r}; choose {OWN}, {', '.join(PROMPTS)}")
    return PROMPTS[name]
