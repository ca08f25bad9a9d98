"""Draw training examples from texts, reproducibly: example i of step n depends on the seed alone.

Text objectives cut memory and local context from long texts, the question objective puts a question's own passage among
others, some of them alike, the cloze objective does so with questions made from passages, the needle objective hides
invented facts, and forms, conversations and pairs of documents are scenes of their own. Some questions have no answer
in memory, some have passages in front that are read whole. Sizes follow the settings of the step. The module reads no
file and runs no model; it hands out :class:`~focus_core.training.objectives.Example`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from focus_core.config import TrainConfig
from focus_core.errors import EmptyCorpusError
from focus_core.model.chat import Message, render_messages
from focus_core.text.tokenization import TextTokenizer
from focus_core.training.cloze import ask_about
from focus_core.training.conversations import invent_conversation
from focus_core.training.facts import Fact, invent_facts
from focus_core.training.forms import invent_forms
from focus_core.training.nearby import OtherPassages, PassageIndex
from focus_core.training.objectives import Example, Query
from focus_core.training.pairs import Pairs
from focus_core.training.scenes import Asked, Scene
from focus_core.training.texts import LONG_TEXT, Passage, QuestionRow, TrainingTexts, read_training_texts

__all__ = ["NOT_THERE", "SHORT_ANSWER", "SYSTEM", "ExampleStream", "invent_facts", "read_training_texts"]

SHORT_ANSWER = "Answer with a short phrase."
SYSTEM = "Use the documents."
NOT_THERE = "Not found."
"""What an adapter says where memory does not hold the answer; few answers begin with its first token."""

PASSAGE_END = "\n\n"
"""Stands behind each passage that is read whole."""

_BESIDE = 2  # passages near each question in play
_SHORT = 0.6  # share of questions with both a short answer and a sentence that ask for a short phrase
_TRICKS = 0.3  # share of unanswered questions that are about their own passage
_GOLD_READ, _NEAR_READ = 0.9, 0.95  # of what is read whole: the gold passages and others; a near miss and others; near
_LONGEST_PROMPT = 4  # where all of a local context runs behind the chunks: so many times the targets there is room for


class ExampleStream:
    """Draws examples of the mixed objectives.

    Args:
        texts: what is drawn from and asked about, from :func:`~focus_core.training.texts.read_training_texts`.
        tokenizer: of the base.
        config: mix, sizes and seed.
        others: rows whose passages stand beside the gold ones; those of ``texts`` if not given.
    """

    def __init__(
        self,
        texts: TrainingTexts,
        tokenizer: TextTokenizer,
        config: TrainConfig,
        others: Sequence[QuestionRow] | None = None,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.questions: Sequence[QuestionRow] = texts.questions
        self.passages, self.unanswered = texts.passages, texts.unanswered
        self._gap = tokenizer.encode(PASSAGE_END)
        alike = zip(*(render_messages(tokenizer, [Message("user", it)], system=SYSTEM) for it in "A?"), strict=False)
        self._opening = tuple(one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], alike))
        untold = [QuestionRow("", (), passage.title, passage.text) for passage in texts.passages]
        self.others = OtherPassages([*(texts.questions if others is None else others), *untold])
        self._all_questions, self._all_others = self.questions, self.others
        self._block: int | None = None
        self._pairs: Pairs | None = None
        self.long = [text for text in texts.texts if len(text) >= LONG_TEXT]
        self._sizes = [len(text) ** 0.5 for text in self.long]
        joins = config.join_texts or any(stage.get("join_texts") for stage in config.stages)
        self.joined = texts.joined() if joins else []
        self._joined_sizes = [len(text) ** 0.5 for text in self.joined]
        self._mix(config)

    def example(self, step: int, index: int) -> Example:
        """Draw example ``index`` of ``step``: the same for the same seed, whatever was drawn before."""
        config = self.config.at(step)
        self._bring_into_play(config, step // config.pool_steps if config.pool else None)
        return self._draw(random.Random(f"{self.config.seed}/{step}/{index}"), config)

    def _bring_into_play(self, config: TrainConfig, block: int | None) -> None:
        """Choose the questions of a block of steps and the passages that stand beside theirs; ``None`` takes all."""
        if self._block == block:
            return
        self._block, self.questions, self.others = block, self._all_questions, self._all_others
        if block is not None:
            rng = random.Random(f"{self.config.seed}/block/{block}")
            self.questions = rng.sample(self._all_questions, min(config.pool, len(self._all_questions)))
            near = [other for row in self.questions for other in self._all_others.nearest(row.question, _BESIDE)]
            self.others = OtherPassages([*self.questions, *near])

    def fixed(self, index: int) -> Example:
        """Draw example ``index`` of a set that no step belongs to, for measuring a loss again and again."""
        self._bring_into_play(self.config, None)
        return self._draw(random.Random(f"{self.config.seed}/fixed/{index}"), self.config)

    def _draw(self, rng: random.Random, config: TrainConfig) -> Example:
        mix = self._mix(config)
        kind = rng.choices(list(mix), weights=list(mix.values()))[0]
        if kind in ("question", "cloze"):
            example = self._question(rng, config, kind)
        elif kind == "needle":
            example = self._needle(rng, config)
        elif kind in ("form", "conversation", "pair"):
            example = self._scene(rng, config, kind)
        else:
            example = self._text(rng, config, kind)
        if config.objective == "one_target":
            example = _one_target(rng, example)
        if config.prompt_lengths:
            prompt = rng.choice(config.prompt_lengths)
            example = replace(example, queries=tuple(replace(query, prompt=prompt) for query in example.queries))
        return example

    def _mix(self, config: TrainConfig) -> dict[str, float]:
        """Return the weights of the objectives that the data can serve."""
        served: dict[str, object] = {
            "question": self.questions,
            "cloze": self.passages or self.long,
            "pair": self.passages,
            **dict.fromkeys(("form", "conversation"), True),  # they need no data
        }
        mix = {kind: weight if served.get(kind, self.long) else 0.0 for kind, weight in config.mix.items()}
        if sum(mix.values()) <= 0:
            raise EmptyCorpusError(
                f"the mix {config.mix} needs texts of at least {LONG_TEXT:,} characters (found {len(self.long)}) or "
                f"question rows (found {len(self.questions)}); give other --data or another mix"
            )
        return mix

    # -- text objectives ----------------------------------------------------------------------------------------

    def _text(self, rng: random.Random, config: TrainConfig, kind: str) -> Example:
        """Continuation: the local context follows the memory. Reconstruction: it is a span of the memory.

        Where k candidates a target leave no room for all of a long local context, its last tokens are the targets.
        """
        size = rng.choice(config.chunk_sizes)
        count = _log_uniform(rng, 1, _most_chunks(config, size))
        low, high = config.local_tokens
        most = high if config.prompt_lengths else min(high, _LONGEST_PROMPT * config.max_candidate_rows // count)
        length = _log_uniform(rng, low, max(low, most))
        split = max(rng.randint(4, max(4, low - 8)), length - config.max_candidate_rows // count)
        length = max(length, split + 2)
        if kind == "reconstruction":  # the span must lie in the memory
            length = max(2, min(length, size * count))
            split = min(split, (length + 1) // 2)
        needed = size * count + (length if kind == "continuation" else 0)
        ids = self._window(rng, max(needed, length + 1), config.join_texts)
        if len(ids) < (needed if kind == "continuation" else length):  # no text is that long: memory is what there is
            length = max(2, min(length, len(ids) // 2))
            split = min(split, (length + 1) // 2)
        memory = ids[: min(size * count, len(ids) - length)] if kind == "continuation" else ids[: size * count]
        chunks = tuple(tuple(memory[start : start + size]) for start in range(0, len(memory), size))
        if kind == "continuation":
            queries = [Query(tuple(ids[len(memory) : len(memory) + length]), split)]
        else:
            starts = [rng.randrange(max(1, len(memory) - length + 1)) for _ in range(1 if count > 8 else 2)]
            queries = [
                Query(tuple(memory[at : at + length]), split, gold=(*range(at // size, (at + length - 1) // size + 1),))
                for at in starts
            ]
        return Example(chunks, tuple(queries), kind)

    def _window(self, rng: random.Random, tokens: int, join: float) -> list[int]:
        """Return ``tokens`` consecutive token ids from a random place of a random text, or of a file's texts joined."""
        joined = join > 0 and rng.random() < join
        texts, sizes = (self.joined, self._joined_sizes) if joined else (self.long, self._sizes)
        for attempt in range(20):
            text = rng.choices(texts, weights=sizes)[0]
            characters = int(tokens * 5) + 64
            start = rng.randrange(max(1, len(text) - characters))
            ids = self.tokenizer.encode(text[start : start + characters])
            if len(ids) >= tokens or attempt == 19:
                return ids[:tokens]
        raise AssertionError("unreachable")

    # -- questions ----------------------------------------------------------------------------------------------

    def _question(self, rng: random.Random, config: TrainConfig, kind: str) -> Example:
        """Questions over documents, one document a chunk; each answered question's own document is among them."""
        size = rng.choice(config.question_chunk_sizes)
        count = _log_uniform(rng, 2, max(2, _most_chunks(config, size)))
        wanted = min(config.questions_per_example, count)
        if kind == "cloze":
            asked = self._made_questions(rng, wanted)
        else:
            asked = rng.sample(self.questions, min(wanted, len(self.questions)))
        if not asked:
            return self._text(rng, config, "reconstruction")
        asked = self._some_without_answer(rng, config, asked)
        present = [row for row in asked if row.context]
        held = [*present, *self.others.draw(rng, asked, count - len(present), config.hard_negatives, config.hard_kinds)]
        rng.shuffle(held)
        own = {row.context for row in asked}
        chunks = [
            self._gold(rng, row, asked, size, config)
            if row.context in own
            else self._passage(rng, row, size, keep=False)
            for row in held
        ]
        near = PassageIndex([f"{row.title} {row.context}" for row in held])
        budget = max(2, config.max_candidate_rows // len(chunks))
        queries = []
        for row in asked:
            answered = bool(row.context and row.answers)
            query = self._chat_query(
                rng,
                row.question,
                row.fullest if answered else NOT_THERE,
                budget,
                row.sentence if answered else NOT_THERE,
            )
            gold = tuple(number for number, other in enumerate(held) if answered and other.context == row.context)
            query = replace(query, gold=gold, absent=not answered)
            queries.append(self._read_whole(rng, config, query, chunks, near.nearest(row.question, len(chunks))))
        return Example(tuple(map(tuple, chunks)), tuple(queries), kind)

    def _some_without_answer(
        self, rng: random.Random, config: TrainConfig, asked: Sequence[QuestionRow]
    ) -> list[QuestionRow]:
        """Take the passage away from some questions (their rows keep no context), or ask what a passage leaves open."""
        if config.not_there <= 0:
            return list(asked)
        found = []
        for row in asked:
            if rng.random() >= config.not_there:
                found.append(row)
            elif self.unanswered and rng.random() < _TRICKS:
                found.append(rng.choice(self.unanswered))
            else:
                told = " ".join(other.context for other in asked if other is not row).lower()
                left = any(answer.lower() in told for answer in row.answers)
                found.append(row if left else replace(row, context=""))
        return found

    def _read_whole(
        self,
        rng: random.Random,
        config: TrainConfig,
        query: Query,
        chunks: Sequence[Sequence[int]],
        near: Sequence[int] = (),
    ) -> Query:
        """Put whole chunks in front of a local context: the gold ones with others, or others alone.

        Laid out as :meth:`~focus_core.method.reading.Reading.read_whole` does it.

        Args:
            rng: draws.
            config: how often, and how many.
            query: its ``gold`` chunks are known.
            chunks: token ids.
            near: numbers of chunks that look like the answer, best first; all others follow in any order.
        """
        if rng.random() >= config.read_whole:
            return query
        alone = config.reader_rank > 0  # what the reader does not read it cannot know
        most = _log_uniform(rng, 1, config.read_chunks)
        most = max(most, len(query.gold)) if alone else most
        room = config.read_tokens if alone else _log_uniform(rng, min(64, config.read_tokens), config.read_tokens)
        wrong = [number for number in near if number not in query.gold]
        rest = [number for number in range(len(chunks)) if number not in {*query.gold, *wrong}]
        rng.shuffle(rest)
        draw = 0.0 if alone else rng.random()
        if draw < _GOLD_READ:
            wanted = [*query.gold, *wrong, *rest]
        elif draw < _NEAR_READ:
            wanted = [*wrong[:1], *rng.sample([*wrong[1:], *rest], len(wrong[1:]) + len(rest))]
        else:
            wanted = wrong or rest
        kept: list[int] = []
        for number in wanted[:most]:
            room -= len(chunks[number]) + len(self._gap)
            if room < 0:
                break
            kept.append(number)
        if alone and not set(query.gold) <= set(kept):
            return query
        kept.sort()
        before = [token for number in kept for token in (*chunks[number], *self._gap)]
        opening = len(self._opening) if query.ids[: len(self._opening)] == self._opening else 0
        return replace(query, before=tuple(before), opening=opening)

    def _made_questions(self, rng: random.Random, count: int) -> list[QuestionRow]:
        """Make questions about passages, and about paragraphs of long texts."""
        made: dict[str, QuestionRow] = {}
        for _ in range(8 * count):
            if len(made) == count:
                break
            listed = self.passages and (not self.long or rng.random() < 0.75)
            row = ask_about(rng, rng.choice(self.passages) if listed else self._paragraph(rng))
            if row is not None:
                made.setdefault(row.context, row)
        return list(made.values())

    def _paragraph(self, rng: random.Random) -> Passage:
        """Cut some whole sentences out of a long text."""
        text = rng.choices(self.long, weights=self._sizes)[0]
        start = rng.randrange(max(1, len(text) - 1200))
        piece = text[start : start + 1200]
        sentences = re.split(r"(?<=[.!?])\s+", piece)[1:-1]
        return Passage("", " ".join(sentences)[:600])

    def _chat_query(
        self, rng: random.Random, question: str, answer: str, most_targets: int, sentence: str = ""
    ) -> Query:
        """Ask in the chat template: for a short phrase, or plainly where there is a sentence to say."""
        short = not sentence or rng.random() < _SHORT
        asked = Message("user", f"{question}\n{SHORT_ANSWER}" if short else question)
        given = render_messages(self.tokenizer, [asked], system=SYSTEM)
        targets = self.tokenizer.encode(answer if short else sentence)
        return _query(rng, given, [*targets, self.tokenizer.end_token], most_targets)

    def _gold(
        self, rng: random.Random, row: QuestionRow, asked: Sequence[QuestionRow], size: int, config: TrainConfig
    ) -> list[int]:
        """Cut a question's passage; sometimes fill its chunk up with other passages, before or behind it."""
        ids = self._passage(rng, row, size, keep=True)
        if rng.random() >= config.fill_chunks:
            return ids
        for other in self.others.draw(rng, asked, 8, config.hard_negatives, config.hard_kinds):
            room = size - len(ids) - 2
            if room < 24:
                break
            gap = self.tokenizer.encode("\n\n")
            more = self._passage(rng, other, room, keep=False)[:room]
            ids = [*more, *gap, *ids] if rng.random() < 0.5 else [*ids, *gap, *more]
        return ids

    def _passage(self, rng: random.Random, row: QuestionRow, size: int, *, keep: bool) -> list[int]:
        """Cut a passage to ``size`` tokens, around the answer if ``keep``; with a pool every time alike."""
        text = row.context
        if self.config.pool:
            rng, keep = random.Random(f"{self.config.seed}/{size}/{text}"), bool(row.answers)
        title = f"{row.title}\n" if row.title and rng.random() < 0.7 else ""
        head = self.tokenizer.encode(title) if title else []
        room = max(8, size - len(head))
        ids = self.tokenizer.encode(text)
        if len(ids) <= room:
            return head + ids
        last = len(ids) - room
        start = rng.randint(0, last)
        if keep:
            at = text.lower().find(row.fullest.lower())
            middle = len(self.tokenizer.encode(text[: max(at, 0)]))
            length = len(self.tokenizer.encode(row.fullest))
            start = min(
                last, max(0, rng.randint(middle + length + 4 - room, max(middle - 4, middle + length + 4 - room)))
            )
        return head + ids[start : start + room]

    # -- needles ------------------------------------------------------------------------------------------------

    def _needle(self, rng: random.Random, config: TrainConfig) -> Example:
        """Invented facts hidden in filler, with facts beside them that look alike."""
        size = rng.choice([size for size in config.chunk_sizes if size >= 32] or [32])
        count = _log_uniform(rng, 2, max(2, _most_chunks(config, size)))
        facts = invent_facts(rng, rng.choice([1, 1, 2, 4, 8, 16]), config.needle_shapes)
        untold = facts.pop() if len(facts) > 1 and rng.random() < config.not_there else None
        filler = self._filler(rng, size * count, config.join_texts)
        chunks = [filler[start : start + size] for start in range(0, size * count, size)]
        for fact in facts:
            ids = self.tokenizer.encode(fact.statement)
            chunk = rng.choice(chunks)
            start = rng.randrange(max(1, len(chunk) - len(ids)))
            chunk[start : start + len(ids)] = ids
        visible = [fact for fact in facts if self._holding(chunks, fact)]
        if not visible:
            return self._text(rng, config, "reconstruction")
        asked = rng.sample(visible, min(config.questions_per_example, len(visible)))
        budget = max(2, config.max_candidate_rows // len(chunks))
        queries = [replace(self._fact_query(rng, fact, budget), gold=self._holding(chunks, fact)) for fact in asked]
        if untold is not None:
            query = self._chat_query(rng, untold.question, NOT_THERE, budget, NOT_THERE)
            queries.append(replace(query, absent=True))
        queries = [self._read_whole(rng, config, query, chunks) for query in queries]
        return Example(tuple(map(tuple, chunks)), tuple(queries), "needle")

    def _holding(self, chunks: Sequence[Sequence[int]], fact: Fact) -> tuple[int, ...]:
        """Return the numbers of the chunks that hold a fact's whole statement: none if another was written over it."""
        ids = self.tokenizer.encode(fact.statement)
        return tuple(
            number
            for number, chunk in enumerate(chunks)
            if any(list(chunk[at : at + len(ids)]) == ids for at in range(len(chunk) - len(ids) + 1))
        )

    def _fact_query(self, rng: random.Random, fact: Fact, most_targets: int) -> Query:
        if rng.random() < 0.5:
            return self._chat_query(rng, fact.question, fact.value, most_targets, f"{fact.lead} {fact.value}.")
        given = self.tokenizer.encode(f"{fact.question} {fact.lead}")
        return _query(rng, given, self.tokenizer.encode(f" {fact.value}."), most_targets)

    def _filler(self, rng: random.Random, tokens: int, join: float) -> list[int]:
        if rng.random() < 0.5:
            return (self._window(rng, tokens, join) * 2)[:tokens]
        sentences = re.split(r"(?<=[.!?])\s+", self.long[rng.randrange(len(self.long))][:20000])
        few = [sentence for sentence in sentences if 10 < len(sentence) < 120] or ["Nothing happens here."]
        ids = self.tokenizer.encode(" ".join(rng.choices(few, k=rng.randint(1, 5))) + " ")
        return (ids * (tokens // len(ids) + 1))[:tokens]

    # -- scenes -------------------------------------------------------------------------------------------------

    def _scene(self, rng: random.Random, config: TrainConfig, kind: str) -> Example:
        """Questions over invented documents, conversations, or two documents at once."""
        size = rng.choice(config.question_chunk_sizes)
        count = _log_uniform(rng, 2, max(2, _most_chunks(config, size)))
        if kind == "form":
            scene = invent_forms(rng, count, config.questions_per_example)
        elif kind == "conversation":
            turns = _log_uniform(rng, 4, max(4, min(config.earlier_turns, config.max_chunks)))
            scene = invent_conversation(rng, turns, config.questions_per_example, config.earlier_turns // 10)
        else:
            self._pairs = self._pairs or Pairs(self.passages)
            scene = self._pairs.draw(rng, count, config.questions_per_example)
        missing = {item for item in scene.asked if rng.random() < config.not_there}
        pieces = [piece for text in _without(scene, missing) for piece in self._pieces(text, size)]
        chunks = [self.tokenizer.encode(piece) for piece in pieces]
        budget = max(2, config.max_candidate_rows // max(1, len(chunks)))
        near, queries = PassageIndex(pieces), []
        for item in scene.asked:
            gold = tuple(n for n, piece in enumerate(pieces) if any(clue in piece for clue in item.clues))
            told = all(any(clue in piece for piece in pieces) for clue in item.clues)
            if told and item not in missing:
                query = replace(self._asked_query(rng, item, budget), gold=gold)
            elif not told and item in missing:
                query = self._asked_query(rng, replace(item, answer=NOT_THERE, sentence=NOT_THERE), budget)
                query = replace(query, absent=True)
            else:  # cut in two, or left where another question needs it
                continue
            queries.append(self._read_whole(rng, config, query, chunks, near.nearest(item.question, len(chunks))))
        if not queries or not chunks:  # all documents were the missing ones
            plain = replace(config, not_there=0.0)
            return self._question(rng, config, "question") if self.questions else self._scene(rng, plain, kind)
        return Example(tuple(map(tuple, chunks)), tuple(queries), kind)

    def _asked_query(self, rng: random.Random, item: Asked, most_targets: int) -> Query:
        if not item.chat:
            return self._chat_query(rng, item.question, item.answer, most_targets, item.sentence)
        turns = enumerate((*item.turns, item.question))
        messages = [Message("assistant" if n % 2 else "user", text) for n, text in turns]
        targets = [*self.tokenizer.encode(item.sentence), self.tokenizer.end_token]
        return _query(rng, render_messages(self.tokenizer, messages, system=SYSTEM), targets, most_targets)

    def _pieces(self, text: str, size: int) -> list[str]:
        """Cut a document into texts of at most ``size`` tokens, behind lines, sentences, commas or words."""
        if len(self.tokenizer.encode(text)) <= size:
            return [text]
        for end in (r"\n", r"[.!?]\s+", r"[,;]\s*", r"\s+"):
            places = [found.end() for found in re.finditer(end, text) if len(text) // 8 < found.end() < len(text)]
            fitting = [at for at in places if len(self.tokenizer.encode(text[:at])) <= size]
            if fitting:
                return [text[: fitting[-1]].rstrip(), *self._pieces(text[fitting[-1] :], size)]
        return [text]


def _without(scene: Scene, missing: set[Asked]) -> list[str]:
    """Return the documents without those that hold what ``missing`` ask for, but for what another question needs."""
    needed = [clue for item in scene.asked if item not in missing for clue in item.clues]
    gone = [item.clues[0] for item in missing]
    return [
        text
        for text in scene.documents
        if not any(clue in text for clue in gone) or any(clue in text for clue in needed)
    ]


def _query(rng: random.Random, given: list[int], targets: list[int], most_targets: int) -> Query:
    """Ask for ``targets`` after ``given``; where they are too many, for a random run of them after those before it."""
    start = rng.randint(0, max(0, len(targets) - most_targets)) if rng.random() < 0.5 else 0
    return Query((*given, *targets[: start + most_targets]), len(given) + start)


def _one_target(rng: random.Random, example: Example) -> Example:
    """Keep one local context and one of its targets: the paper's published code supervises one token an example."""
    query = rng.choice(example.queries)
    split = rng.randrange(query.split, len(query.ids))
    return replace(example, queries=(replace(query, ids=query.ids[: split + 1], split=split),))


def _most_chunks(config: TrainConfig, size: int) -> int:
    return max(1, min(config.max_chunks, config.max_memory_tokens // size))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, max(low, round(math.exp(rng.uniform(math.log(low), math.log(high + 0.49))))))
