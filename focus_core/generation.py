"""Generate an answer token by token: candidates, local pass, sample, yield.

Sampling uses transformers' own logits processors; stop strings are held back until they can no longer match; a request
owns its random generator, so equal seeds give equal answers whatever runs beside it. It holds no model state: that is
:class:`~focus_core.method.reading.Reading`.
"""

from __future__ import annotations

import codecs
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from focus_core.config import DecodeConfig
from focus_core.errors import BaseModelError, CancelledError
from focus_core.method.attribution import AttentionRecord, leading_chunks
from focus_core.method.looking import Looking
from focus_core.method.reading import Reading
from focus_core.method.support import support_features
from focus_core.model.constraints import Constraint
from focus_core.text.tokenization import TextTokenizer


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        id: token id.
        text: text that became certain with it; empty while a character or a stop string is incomplete.
        logprob: natural log of its probability before any sampling option.
        top: the likeliest alternatives as (id, logprob), if they were asked for.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """A running request; iterate over :meth:`tokens`.

    Args:
        reading: the model's side of it.
        tokenizer: turns ids into text.
        decode: sampling options.
        end_tokens: ids that end the answer.
        heads: (layer, head) pairs for attribution.
        cancelled: set it to stop within one layer.
        constraint: what the answer is held to.
        opening: tokens that other requests begin with too, see :meth:`Reading.begin`.
        declining: first token of the sentence that the adapter declines with.

    ``stopped_by`` is the stop string that ended it, if one did.
    """

    reading: Reading
    tokenizer: TextTokenizer
    decode: DecodeConfig
    end_tokens: frozenset[int]
    heads: Sequence[tuple[int, int]] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)
    constraint: Constraint | None = None
    opening: int = 0
    declining: int | None = None
    finish_reason: str | None = None
    stopped_by: str | None = None
    prompt_tokens: int = 0
    generated: list[int] = field(default_factory=list)
    support_features: tuple[float, ...] = ()
    record: AttentionRecord = field(init=False)

    def __post_init__(self) -> None:
        self.record = AttentionRecord(self.reading.chunks, self.heads)
        # not a method of this object: the cycle would keep the memory that is read until Python collects it
        self.reading.check = partial(check_cancelled, self.cancelled)

    def tokens(self, local: Sequence[int]) -> Iterator[Token]:
        """Yield tokens until an end token, a stop string, the limit, or cancellation."""
        self.prompt_tokens = len(local)
        text = _TextStream(self.tokenizer, self.decode.stop)
        sampler = _Sampler(self.decode, self.reading.base.device)
        try:
            logits = self.reading.begin(local, self.opening)
            mass = self.reading.mass
            looking = self._looking() if self.decode.reread and mass else None
            if looking is not None:
                logits = self._read_whole(looking.choose(self.record.scores_of(mass)), logits)
            elif mass and self.decode.chunk_top_p is not None and self.decode.chunk_top_p < 1:
                kept = leading_chunks(self.record.scores_of(mass), self.decode.chunk_top_p)
                if len(kept) < self.reading.chunks:
                    logits = self.reading.narrow(kept)
            if mass:
                self.support_features = support_features(self.record.scores_of(mass), logits, self.declining)
            while True:
                token, logprob, top = self._draw(sampler, logits)
                if mass:
                    self.record.add(mass)
                self.generated.append(token)
                ended = token in self.end_tokens
                done = self.constraint is not None and self.constraint.finished
                piece = "" if ended else text.push(token)
                if ended or done or text.stopped:
                    self.finish_reason = "stop"
                elif len(self.generated) >= self.decode.max_tokens:
                    self.finish_reason = "length"
                if self.finish_reason:
                    self.stopped_by = text.stopped_by
                    yield Token(token, piece + text.flush(), logprob, top)
                    return
                yield Token(token, piece, logprob, top)
                logits = self.reading.step(token)
                mass = self.reading.mass
                if looking is not None:
                    changed = looking.change(self.record.scores_of(mass), self.reading.whole)
                    logits = logits if changed is None else self._read_whole(changed, logits)
        except CancelledError:
            self.finish_reason = "cancelled"

    def _looking(self) -> Looking:
        share = 1.0 if self.decode.chunk_top_p is None else self.decode.chunk_top_p
        lengths = [len(chunk.ids) for chunk in self.reading.state.chunks]
        return Looking(self.decode.reread or 0, self.decode.reread_tokens, share, lengths)

    def _read_whole(self, chunks: Sequence[int], logits: Tensor) -> Tensor:
        """Return the logits behind these chunks, or ``logits`` where not one of them fits."""
        moved, joint = self.decode.reread_way == "moved", self.tokenizer.encode("\n\n")
        closer = self.reading.read_whole(chunks, joint, moved=moved)
        return logits if closer is None else closer

    def _draw(self, sampler: _Sampler, logits: Tensor) -> tuple[int, float, tuple[tuple[int, float], ...]]:
        """Draw a token that the constraint takes."""
        if self.constraint is None:
            return sampler.draw(self.reading.ids, logits)
        left = self.decode.max_tokens - len(self.generated) - 1
        drawn = sampler.draw(self.reading.ids, logits, self.constraint.allowed(len(logits)))
        if not self.constraint.accept(drawn[0], left):
            drawn = sampler.draw(self.reading.ids, logits, self.constraint.ending(len(logits)))
            self.constraint.accept(drawn[0], left)
        return drawn


def check_cancelled(cancelled: threading.Event) -> None:
    """Raise :class:`CancelledError` if the event is set."""
    if cancelled.is_set():
        raise CancelledError("the request was cancelled")


class _Sampler:
    """Draws tokens with transformers' processors and a generator of its own."""

    def __init__(self, decode: DecodeConfig, device: torch.device) -> None:
        self.decode = decode
        self.penalty = LogitsProcessorList()
        self.warpers = LogitsProcessorList()
        if decode.repetition_penalty != 1.0:
            self.penalty.append(RepetitionPenaltyLogitsProcessor(decode.repetition_penalty))
        if decode.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(decode.temperature))
        if decode.top_k:
            self.warpers.append(TopKLogitsWarper(decode.top_k))
        if decode.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(decode.top_p))
        if decode.min_p:
            self.warpers.append(MinPLogitsWarper(decode.min_p))
        self.generator = torch.Generator(device)
        if decode.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(decode.seed)

    def draw(
        self, ids: Sequence[int], logits: Tensor, allowed: Tensor | None = None
    ) -> tuple[int, float, tuple[tuple[int, float], ...]]:
        """Return the next token, its log-probability, and the alternatives.

        Args:
            ids: all tokens before it.
            logits: (vocabulary,).
            allowed: (vocabulary,) tokens that may be drawn; ``None`` means all.
        """
        logprobs = torch.log_softmax(logits, dim=-1)
        history: Any = torch.tensor([list(ids)], device=logits.device)
        scores: Any = self.penalty(history, logits.unsqueeze(0))
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
        if self.decode.temperature == 0.0:
            token = int(scores.argmax())
        else:
            _number(logprobs[0])  # drawing from NaN would end a CUDA process
            probabilities = torch.softmax(self.warpers(history, scores), dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        top: tuple[tuple[int, float], ...] = ()
        if self.decode.logprobs:
            best = logprobs.topk(min(self.decode.logprobs, logprobs.numel()))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, _number(logprobs[token]), top


def _number(logprob: Tensor) -> float:
    """Return a log-probability; of logits that are NaN the likeliest token would be the vocabulary's first."""
    value = float(logprob)
    if math.isnan(value):
        raise BaseModelError(
            "the model gives no numbers (NaN); its weights or adapter are damaged, or too large for this dtype: get "
            "them again, or use another dtype"
        )
    return value


class _TextStream:
    """Turns tokens into text pieces that will not change any more and end at character boundaries."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self.stopped_by: str | None = None
        self._ids: list[int] = []
        self._sure = 0  # tokens whose text has been read into _held
        self._held = ""
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")  # of byte tokens, a character's one by one

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        self._ids.append(token)
        byte = self.tokenizer.byte_tokens.get(token)
        if byte is not None:
            self._held += self._bytes.decode(bytes([byte]))
            self._sure = len(self._ids)
        else:
            self._held += self._bytes.decode(b"", final=True)
            text = self._unread()
            if text.endswith("\ufffd") and len(self._ids) - self._sure < 8:
                return ""
            self._sure = len(self._ids)
            self._held += text
        for stop in self.stop:
            at = self._held.find(stop)
            if at >= 0:
                self._held, self.stopped, self.stopped_by = self._held[:at], True, stop
        if self.stopped:
            return self.flush()
        keep = self._may_begin_stop()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def flush(self) -> str:
        """Return what was held back."""
        if not self.stopped:
            self._held += self._bytes.decode(b"", final=True) + self._unread()
            self._sure = len(self._ids)
        text, self._held = self._held, ""
        return text

    def _unread(self) -> str:
        """Return the text of the tokens that have not been read."""
        before = max(0, self._sure - 4)  # some context: a token's text can depend on the one before it
        known = self.tokenizer.decode(self._ids[before : self._sure])
        return self.tokenizer.decode(self._ids[before:])[len(known) :]

    def _may_begin_stop(self) -> int:
        """Return how many of the last characters could be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
                if self._held.endswith(stop[:size]):
                    longest = max(longest, size)
                    break
        return longest
