"""Make questions from passages without an annotator: a span of a sentence is the answer, the rest asks for it.

Facts that encyclopaedias state in fixed words (who directed it, when she was born) become plain questions; any other
sentence becomes a question by putting a question word for a name, a date or a number (after Lewis et al., "Unsupervised
Question Answering by Cloze Translation", ACL 2019). Questions lose some of their words, so that they are not found by
likeness alone. The module knows no tokenizer; what it makes depends on the passage and the random generator alone.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from focus_core.training.texts import Passage, QuestionRow

_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = rf"(?:\d{{1,2}} (?:{_MONTH})(?: \d{{4}})?|(?:{_MONTH}) \d{{1,2}}(?:, \d{{4}})?|(?:{_MONTH}) \d{{4}})"
_WORD = r"(?:[A-Z]\.|(?:Jr|St|Dr|Mr|Mrs|Ms)\.|[A-Z][\w'’-]*|\d+)"
_NAME = rf"(?!\d){_WORD}(?: (?:(?:of|the|de|da|di|van|von|and|for|in) )?{_WORD}){{0,4}}"
_PRONOUN = re.compile(r"^(?:He|She|It|They|His|Her|Its|Their)\b")
_SENTENCE = re.compile(r"(?<=[a-z0-9)\]\"”][.!?])\s+(?=[A-Z\"“])")
_SKIPPED = frozenset(
    [
        *("He", "She", "It", "They", "His", "Her", "Its", "Their", "The", "This", "That", "These", "Those"),
        *("In", "On", "At", "For", "From", "After", "Before"),
    ]
)
_CLAUSE = r"(?= (?:by|who|which|that|and|written|directed|published|located)\b|[,.;])"


@dataclass(frozen=True)
class _Fact:
    """How a fact is stated (``answer`` is a group; the subject is the title) and asked for."""

    stated: re.Pattern[str]
    asked: tuple[str, ...]


def _fact(stated: str, *asked: str) -> _Fact:
    return _Fact(re.compile(stated), asked)


_FACTS = [
    _fact(
        rf"\b(?:born|b\.)(?: on)? (?P<answer>{_DATE}|\d{{4}})",
        "when was {t} born",
        "what is the date of birth of {t}",
        "When was {t} born?",
    ),
    _fact(
        rf"(?:\bdied(?: on)?|[–-]) (?P<answer>{_DATE}|\d{{4}})\)",
        "when did {t} die",
        "what is the date of death of {t}",
        "When did {t} die?",
    ),
    _fact(rf"\bborn in (?P<answer>{_NAME}(?:, {_NAME})?)", "where was {t} born", "In which place was {t} born?"),
    _fact(rf"\bdied in (?P<answer>{_NAME}(?:, {_NAME})?)", "where did {t} die", "What was the place of death of {t}?"),
    _fact(rf"\bdirected by (?P<answer>{_NAME})", "who directed {t}", "who is the director of {t}", "Who directed {t}?"),
    _fact(rf"\bproduced by (?P<answer>{_NAME})", "who produced {t}", "Who was the producer of {t}?"),
    _fact(rf"\bwritten by (?P<answer>{_NAME})", "who wrote {t}", "who is the author of {t}", "Who wrote {t}?"),
    _fact(rf"\bcomposed by (?P<answer>{_NAME})", "who composed {t}", "who made the music of {t}"),
    _fact(rf"\b(?:starring|stars) (?P<answer>{_NAME})", "who stars in {t}", "who plays the lead in {t}"),
    _fact(rf"\bfounded by (?P<answer>{_NAME})", "who founded {t}", "Who was the founder of {t}?"),
    _fact(
        rf"\bmarried (?:to )?(?P<answer>{_NAME})", "who did {t} marry", "who was married to {t}", "Who is {t}'s spouse?"
    ),
    _fact(rf"\b(?:son|daughter|child) of (?P<answer>{_NAME})", "who was the father of {t}", "who is a parent of {t}"),
    _fact(rf"\b(?:located|situated) in (?P<answer>{_NAME}(?:, {_NAME})?)", "where is {t}", "where is {t} located"),
    _fact(
        r"\b(?:released|published) (?:in|on) (?P<answer>[^,.;()]*\d{4})",
        "when was {t} released",
        "when did {t} come out",
    ),
    _fact(
        r"\b(?:founded|established|built|opened) in (?P<answer>[^,.;()]*\d{4})",
        "when was {t} founded",
        "when did {t} open",
    ),
    _fact(
        r"\b(?:is|was|are|were) (?P<answer>an? [^,.;()]{6,70}?)" + _CLAUSE,
        "what is {t}",
        "What was {t}?",
        "who or what is {t}",
    ),
    _fact(r"\b(?:is|was) an? (?P<answer>[A-Z]\w+) ", "what is the nationality of {t}", "from which country is {t}"),
]
_SPANS = [
    (re.compile(_DATE), ("when", "on what date", "what date")),
    (re.compile(r"\b(?:1[0-9]{3}|20[0-2][0-9])\b"), ("when", "in what year", "which year")),
    (
        re.compile(
            r"\b(?![12]\d{3}\b)\d[\d,.]*(?: (?:million|billion|percent|per cent|km|miles|metres|people|years))?\b"
        ),
        ("how many", "how much", "what number"),
    ),
    (re.compile(r"[\"“](?P<answer>[^\"”]{4,60})[\"”]"), ("what", "which title")),
    (re.compile(_NAME), ("who", "what", "which", "who or what", "where")),
]


def ask_about(rng: random.Random, passage: Passage) -> QuestionRow | None:
    """Return a question that the passage answers, or ``None`` where no sentence gives one."""
    if passage.title and rng.random() < 0.4:
        row = _stated_fact(rng, passage)
        if row is not None:
            return row
    sentences = [part.strip() for part in _SENTENCE.split(passage.text)]
    usable = [part for part in sentences if 6 <= len(part.split()) <= 45]
    rng.shuffle(usable)
    for sentence in usable[:4]:
        row = _cloze(rng, passage, sentence)
        if row is not None:
            return row
    return None


def _stated_fact(rng: random.Random, passage: Passage) -> QuestionRow | None:
    for fact in rng.sample(_FACTS, len(_FACTS)):
        found = fact.stated.search(passage.text)
        if found is not None:
            answer = found["answer"].strip(" .,")
            title = re.sub(r"\s*\([^)]*\)$", "", passage.title)
            title = title.lower() if rng.random() < 0.3 else title
            if answer and answer.lower() not in title.lower():
                return QuestionRow(rng.choice(fact.asked).format(t=title), (answer,), passage.title, passage.text)
    return None


def _cloze(rng: random.Random, passage: Passage, sentence: str) -> QuestionRow | None:
    spans = [
        (match.start(group), match.end(group), words)
        for pattern, words in _SPANS
        for match in pattern.finditer(sentence)
        for group in ["answer" if "answer" in pattern.groupindex else 0]
    ]
    spans = [span for span in spans if _asks(sentence, span[0], span[1])]
    if not spans:
        return None
    start, end, words = rng.choice(spans)
    answer = sentence[start:end].rstrip(".,'’-")
    before, behind = sentence[:start].strip(), sentence[start + len(answer) :].strip().rstrip(".!?")
    if passage.title and _PRONOUN.match(before):
        before = re.sub(r"^\w+", passage.title, before)
    word = rng.choice(words)
    keep = rng.choice([1.0, 1.0, 0.8, 0.6])
    before, behind = _thin(rng, before, keep), _thin(rng, behind, keep)
    if not before or rng.random() < 0.6:  # the question word stands first
        question = f"{word} {behind}" if not before else f"{word} {before} {behind}"
    else:
        question = f"{before} {word} {behind}"
    question = re.sub(r"\s+", " ", re.sub(r"\s([,.;:])", r"\1", question)).strip(" ,;:")
    question = question.lower() if rng.random() < 0.4 else question[0].upper() + question[1:]
    question += "?" if rng.random() < 0.6 else ""
    if answer.lower() in question.lower() or len(question.split()) < 4:
        return None
    return QuestionRow(question, (answer,), passage.title, passage.text)


def _asks(sentence: str, start: int, end: int) -> bool:
    """Return whether the span is worth asking for: said once, not a mere first word, neither tiny nor most of it."""
    answer = sentence[start:end].rstrip(".,'’-")
    if not 2 < len(answer) < 80 or answer in _SKIPPED or sentence.lower().count(answer.lower()) > 1:
        return False
    return (start > 0 or " " in answer) and len(answer) < 0.6 * len(sentence)


def _thin(rng: random.Random, text: str, keep: float) -> str:
    """Return the words of ``text``, each kept with probability ``keep``."""
    return " ".join(word for word in text.split() if keep == 1.0 or rng.random() < keep)
