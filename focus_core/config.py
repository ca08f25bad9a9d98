"""Hold every setting in frozen dataclasses that check themselves.

Each check raises :class:`~focus_core.errors.ConfigError` with the name, the bound and the value. The module reads no
file and knows no model; ``to_dict`` / ``from_dict`` round-trip through JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from focus_core.errors import ConfigError

Positions = Literal["ordered", "shared"]
LocalMode = Literal["exact", "incremental"]


def _bounded(name: str, value: float, low: float, high: float | None = None) -> None:
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name} must be {bound}; got {value}")


def _one_of(name: str, value: str, literal: Any) -> None:
    if value not in get_args(literal):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(literal))}; got {value!r}")


class _Json:
    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from ``to_dict``'s output; unknown names raise :class:`ConfigError`."""
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; {cls.__name__} knows {', '.join(sorted(known))}")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)


@dataclass(frozen=True)
class FocusConfig(_Json):
    """How memory is cut and read: everything that changes the function computed (arXiv 2408.11745, section 2).

    Args:
        window: tokens a row may hold: sink + chunk + prompt + candidate (the paper's L, 4096).
        chunk_size: most tokens of one chunk.
        prompt_length: most tokens of the dynamic prompt (the paper's default is 512).
        positions: ``shared`` gives all candidates one position; ``ordered`` gives them 0..k-1 (the published code).
        sink: start every chunk row and the local row with the base's BOS.
        local_mode: ``incremental`` keeps local KV; ``exact`` reads the local context again at every step.
    """

    window: int = 4096
    chunk_size: int = 512
    prompt_length: int = 512
    positions: Positions = "shared"
    sink: bool = True
    local_mode: LocalMode = "incremental"

    def __post_init__(self) -> None:
        _bounded("window", self.window, 8)
        _bounded("prompt_length", self.prompt_length, 1, self.window - 2)
        _bounded("chunk_size", self.chunk_size, 1)
        _one_of("positions", self.positions, Positions)
        _one_of("local_mode", self.local_mode, LocalMode)
        room = self.largest_chunk
        if self.chunk_size > room:
            raise ConfigError(
                f"chunk_size must be at most {room} (window {self.window} - prompt {self.prompt_length} - sink "
                f"{int(self.sink)} - candidate 1); got {self.chunk_size}"
            )

    @property
    def largest_chunk(self) -> int:
        """Most tokens a chunk may have so that its row never exceeds the window."""
        return self.window - self.prompt_length - int(self.sink) - 1


@dataclass(frozen=True)
class DecodeConfig(_Json):
    """How an answer is sampled. The defaults are greedy.

    Args:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; above 0 samples.
        top_p, top_k, min_p: the usual truncations; 1.0, 0 and 0.0 switch them off.
        repetition_penalty: above 1 discourages tokens of the local context and the answer.
        stop: strings that end the answer; they are not part of it.
        seed: makes sampling reproducible for this request alone.
        logprobs: how many alternatives to report per token; 0 reports none.
        chunks_per_batch: chunks run together in a step; ``None`` chooses from free memory.
        reread: how many chunks, those with most attention, are also read whole in front of the local context; 0 is
            the paper's method, in which the local rows see candidates alone.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int = 0
    chunks_per_batch: int | None = None
    reread: int = 0

    def __post_init__(self) -> None:
        _bounded("max_tokens", self.max_tokens, 1)
        _bounded("reread", self.reread, 0)
        _bounded("temperature", self.temperature, 0.0)
        _bounded("top_p", self.top_p, 0.0, 1.0)
        _bounded("top_k", self.top_k, 0)
        _bounded("min_p", self.min_p, 0.0, 1.0)
        _bounded("logprobs", self.logprobs, 0)
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be above 0; got {self.repetition_penalty}")
        if self.chunks_per_batch is not None:
            _bounded("chunks_per_batch", self.chunks_per_batch, 1)
        if any(not text for text in self.stop):
            raise ConfigError("stop must hold non-empty strings; got ''")


@dataclass(frozen=True)
class TrainConfig(_Json):
    """How candidate projections are trained (dense objectives; see docs/training.md).

    Args:
        steps: optimizer steps in the whole schedule.
        examples_per_step: examples whose gradients are added before a step.
        learning_rate: peak of AdamW's rate; it warms up, then falls to ``final_rate`` of the peak.
        schedule: ``linear`` or ``cosine``.
        mix: weight of each objective in the example stream.
        chunk_sizes: drawn uniformly for text objectives.
        max_chunks: k is drawn log-uniformly up to this.
        max_memory_tokens: k times the chunk size never exceeds this.
        local_tokens: least and most tokens of a local context of the text objectives.
        max_candidate_rows: candidates of one example (k x targets), the bound on the gradient graph.
        questions_per_example: questions asked over one chunk pass.
        question_chunk_sizes: drawn uniformly for the question objective; longer passages are cut around the answer.
        hard_negatives: share of the other passages that are of the same title or share rare words with a question.
        fill_chunks: probability that a question's own chunk is filled up with other passages.
    """

    steps: int = 1000
    examples_per_step: int = 2
    learning_rate: float = 3e-4
    final_rate: float = 0.05
    warmup_steps: int = 20
    schedule: Literal["linear", "cosine"] = "linear"
    max_grad_norm: float = 1.0
    seed: int = 0
    positions: Positions = "shared"
    sink: bool = True
    mix: dict[str, float] = field(
        default_factory=lambda: {"reconstruction": 0.35, "continuation": 0.1, "question": 0.4, "needle": 0.15}
    )
    chunk_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    max_chunks: int = 128
    max_memory_tokens: int = 1536
    local_tokens: tuple[int, int] = (24, 64)
    max_candidate_rows: int = 512
    questions_per_example: int = 3
    question_chunk_sizes: tuple[int, ...] = (48, 64, 96, 128)
    hard_negatives: float = 0.3
    fill_chunks: float = 0.0

    def __post_init__(self) -> None:
        _bounded("steps", self.steps, 1)
        _bounded("examples_per_step", self.examples_per_step, 1)
        _bounded("max_chunks", self.max_chunks, 1)
        _bounded("questions_per_example", self.questions_per_example, 1)
        _bounded("max_candidate_rows", self.max_candidate_rows, 2)
        _one_of("positions", self.positions, Positions)
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be above 0; got {self.learning_rate}")
        _bounded("hard_negatives", self.hard_negatives, 0.0, 1.0)
        _bounded("fill_chunks", self.fill_chunks, 0.0, 1.0)
        for name in ("chunk_sizes", "question_chunk_sizes"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ConfigError(f"{name} must hold positive numbers; got {sizes}")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise ConfigError(f"mix must hold weights of at least 0 with a positive sum; got {self.mix}")
        if self.local_tokens[0] < 4 or self.local_tokens[1] < self.local_tokens[0]:
            raise ConfigError(f"local_tokens must be (least >= 4, most >= least); got {self.local_tokens}")
