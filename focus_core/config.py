"""Hold every setting in frozen dataclasses that check themselves.

Each check raises :class:`~focus_core.errors.ConfigError` with the name, the bound and the value. The module reads no
file and knows no model; ``to_dict`` / ``from_dict`` round-trip through JSON.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from focus_core.errors import ConfigError

Positions = Literal["ordered", "shared"]
LocalMode = Literal["exact", "incremental"]
CandidateBias = Literal["none", "log_k"]
KVFormat = Literal["base", "int8", "int4"]
RereadWay = Literal["run", "moved"]


def _bounded(name: str, value: Any, low: float, high: float | None = None, *, above: bool = False) -> None:
    """Check ``low <= value <= high``, or ``low < value`` with ``above``; what is no number fails too."""
    whole = isinstance(low, int)
    kind = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if not kind or not (low < value if above else low <= value) or (high is not None and not value <= high):
        least = f"above {low}" if above else f"at least {low}"
        bound = least if high is None else f"{least} and at most {high}" if above else f"between {low} and {high}"
        raise ConfigError(f"{name} must be {'a whole number ' if whole and not kind else ''}{bound}; got {value!r}")


def _one_of(name: str, value: str, literal: Any) -> None:
    if value not in get_args(literal):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(literal))}; got {value!r}")


def _tuples(value: Any) -> Any:
    """Return JSON values with tuples for lists, so that settings compare equal after a round trip."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


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
        return cls(**_tuples(values))


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
        candidate_bias: ``log_k`` lowers the score of every candidate by log k, so that k candidates that say the same
            weigh as one.
        top_candidates: each head of a local row attends only to so many candidates of the highest score; 0 to all.
        first_candidate_layer: local rows attend to candidates from this layer on. Layer 0's candidates depend on the
            token alone, so all k are equal there; 1 leaves them out.
        kv_format: how chunk KV is written: ``base`` as the base computes it, ``int8`` (about half the bytes), ``int4``
            (about a third).
        memory_budget: most bytes of memory for chunk KV that lies on disk; what does not fit is read again at every
            step. ``None`` takes most of what is free. It changes no answer.
    """

    window: int = 4096
    chunk_size: int = 512
    prompt_length: int = 512
    positions: Positions = "shared"
    sink: bool = True
    local_mode: LocalMode = "incremental"
    candidate_bias: CandidateBias = "none"
    top_candidates: int = 0
    first_candidate_layer: int = 0
    kv_format: KVFormat = "base"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        _bounded("window", self.window, 8)
        _bounded("prompt_length", self.prompt_length, 1, self.window - 2)
        _bounded("chunk_size", self.chunk_size, 1)
        _one_of("positions", self.positions, Positions)
        _one_of("local_mode", self.local_mode, LocalMode)
        _one_of("candidate_bias", self.candidate_bias, CandidateBias)
        _one_of("kv_format", self.kv_format, KVFormat)
        if self.memory_budget is not None:
            _bounded("memory_budget", self.memory_budget, 0)
        _bounded("top_candidates", self.top_candidates, 0)
        _bounded("first_candidate_layer", self.first_candidate_layer, 0)
        room = self.largest_chunk
        if self.chunk_size > room:
            raise ConfigError(
                f"chunk_size must be at most {room} (window {self.window} - prompt {self.prompt_length} - sink "
                f"{int(self.sink)} - candidate 1); got {self.chunk_size}"
            )

    def of_answers(self) -> dict[str, Any]:
        """Return the settings that an answer depends on: all but where chunk KV lies while it is read."""
        return {name: value for name, value in self.to_dict().items() if name != "memory_budget"}

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
        reread: how many chunks, those with most attention, are read whole in the local context: by the adapter's
            reader alone, or without one behind the candidates of all, chosen again when attention moves. 0 is the
            paper's method, in which the local rows see candidates alone; ``None`` takes the adapter's.
        reread_tokens: most tokens of these chunks together.
        reread_way: ``run`` passes their tokens through the model in front of the question; ``moved`` takes their
            chunk KV as it is, keys turned to the new places, without a reader.
        chunk_top_p: share of the attention at the end of the prompt, as with ``top_p``. With ``reread``, chunks are
            read whole until they hold it; without, the answer is read from the candidates of these chunks alone.
            1.0 sets no bound (the paper's method), ``None`` takes the adapter's.
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
    reread: int | None = None
    reread_tokens: int = 2048
    reread_way: RereadWay = "run"
    chunk_top_p: float | None = None

    def __post_init__(self) -> None:
        _bounded("max_tokens", self.max_tokens, 1)
        if self.reread is not None:
            _bounded("reread", self.reread, 0)
        _bounded("reread_tokens", self.reread_tokens, 1)
        _one_of("reread_way", self.reread_way, RereadWay)
        if self.chunk_top_p is not None:
            _bounded("chunk_top_p", self.chunk_top_p, 0.0, 1.0)
        _bounded("temperature", self.temperature, 0.0)
        _bounded("top_p", self.top_p, 0.0, 1.0, above=True)
        _bounded("top_k", self.top_k, 0)
        _bounded("min_p", self.min_p, 0.0, 1.0)
        _bounded("logprobs", self.logprobs, 0)
        _bounded("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        if self.chunks_per_batch is not None:
            _bounded("chunks_per_batch", self.chunks_per_batch, 1)
        if self.seed is not None:
            _bounded("seed", self.seed, -(2**63), 2**63 - 1)
        if any(not text for text in self.stop):
            raise ConfigError("stop must hold non-empty strings; got ''")


Schedule = Literal["linear", "cosine"]
Objective = Literal["dense", "one_target"]
TeacherMemory = Literal["all", "end", "gold"]
OBJECTIVES = ("reconstruction", "continuation", "question", "cloze", "needle", "form", "conversation", "pair")
HARD_NEGATIVES = ("nearest", "article")
NEEDLE_SHAPES = ("number", "code", "date", "name", "phrase", "word")
_STAGED = (
    *("mix", "chunk_sizes", "question_chunk_sizes", "max_chunks", "max_memory_tokens", "local_tokens"),
    *("prompt_lengths", "max_candidate_rows", "questions_per_example", "hard_negatives", "fill_chunks"),
    *("join_texts", "hard_kinds", "not_there", "read_whole", "read_chunks", "read_tokens", "earlier_turns"),
    *("pool", "pool_steps"),
)


@dataclass(frozen=True)
class TrainConfig(_Json):
    """How candidate projections are trained (see docs/training.md).

    Args:
        steps: optimizer steps in the whole schedule.
        examples_per_step: examples whose gradients are added before a step, over all processes.
        examples_per_pass: examples that one process runs together; fewer need less memory, the gradient is the same.
            ``None`` runs all of a process's share at once.
        gradient_checkpointing: keep each layer's input alone for the backward pass and run the layer again there: less
            memory, more time, the same gradient.
        rank: of what is trained: differences from the base's matrices, as the product of two thin ones; ``None`` trains
            whole matrices.
        reader_rank: of the reader: differences that local rows take while chunks are read whole; 0
            leaves these rows the base's, unless ``init`` has a reader.
        fixed_candidates: train the reader alone; candidates stay what ``init`` made them.
        learning_rate: peak of AdamW's rate; it warms up, then falls to ``final_rate`` of the peak.
        schedule: ``linear`` or ``cosine``.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of the example stream and of what is held out.
        positions: of the candidates, see :class:`FocusConfig`.
        sink: start every row with the base's BOS.
        candidate_bias: see :class:`FocusConfig`; the adapter is served with what it was trained with.
        top_candidates: see :class:`FocusConfig`.
        first_candidate_layer: see :class:`FocusConfig`.
        objective: ``dense`` supervises every local token from the split on; ``one_target`` one token an example, as
            the paper's published code does.
        mix: weight of each objective in the example stream.
        chunk_sizes: drawn uniformly for the text and needle objectives.
        max_chunks: k is drawn log-uniformly up to this.
        max_memory_tokens: k times the chunk size never exceeds this.
        join_texts: share of the text objectives' examples that are cut from all texts of a file, joined in their order,
            as a folder of short documents would be remembered.
        local_tokens: least and most tokens of a local context of the text objectives.
        prompt_lengths: drawn uniformly: only so many tokens of the local context run behind the chunks, as with
            ``FocusConfig.prompt_length``. Empty runs all of it.
        max_candidate_rows: candidates of one local context (k x targets), the bound on the gradient graph; an example
            of ``questions_per_example`` questions has as many times more.
        questions_per_example: questions asked over one chunk pass.
        question_chunk_sizes: drawn uniformly for the question objective; longer passages are cut around the answer.
        hard_negatives: share of the other passages that are of the same title or share rare words with a question.
        hard_kinds: weight of each kind of them: ``nearest`` to a question by BM25, of the same ``article``.
        not_there: share of questions whose answer is nowhere in memory; the target is the adapter's ``not_there``
            sentence, and near misses stand in the gold passage's place.
        read_whole: share of the questions that have passages read whole in front of them, as ``DecodeConfig.reread``
            puts them there: the gold one and some near ones, or near ones alone.
        read_chunks: most passages read whole; their number is drawn log-uniformly.
        read_tokens: most tokens of them.
        earlier_turns: most turns of a conversation that stand in memory; most that stand in the local context is a
            tenth of it.
        pool: questions in play at a time, with two near passages each; their passages are cut alike every time, so that
            their chunk KV can be kept (``kept_kv_mib``). 0 asks any question at any step and cuts anew each time.
        pool_steps: steps after which other questions come into play.
        kept_kv_mib: most memory for chunk KV that is kept between steps, in each process; 0 keeps none.
        fill_chunks: probability that a question's own chunk is filled up with other passages.
        needle_shapes: weight of each shape of a needle's value (``number``, ``code``, ``date``, ``name``, ``phrase``,
            ``word``); empty for weights of our own.
        stages: settings that hold for the first part of the run: ``{"until": 0.25, "max_chunks": 16}`` for the first
            quarter; the first stage that a step falls into counts, after the last one the settings above do.
        distillation: weight of the KL divergence from the base that reads the memory in its own window, per objective.
        teacher_memory: what that base reads: ``all`` chunks (no teacher where they do not fit), the last ones that fit
            (``end``), or the ``gold`` ones of the local context.
        eval_every: steps between measurements of the held-out loss; 0 never measures and holds nothing out.
        eval_examples: examples that it is measured on, always the same, and dense whatever is trained.
        eval_mix: weight of each objective in them; empty is ``mix``. Give it to compare runs of different ``mix``.
        held_out: share of texts and of passages that is kept out of training for it.
    """

    steps: int = 1000
    examples_per_step: int = 2
    examples_per_pass: int | None = None
    gradient_checkpointing: bool = False
    rank: int | None = None
    reader_rank: int = 0
    fixed_candidates: bool = False
    learning_rate: float = 3e-4
    final_rate: float = 0.05
    warmup_steps: int = 20
    schedule: Schedule = "linear"
    max_grad_norm: float = 1.0
    seed: int = 0
    positions: Positions = "shared"
    sink: bool = True
    candidate_bias: CandidateBias = "none"
    top_candidates: int = 0
    first_candidate_layer: int = 0
    objective: Objective = "dense"
    mix: dict[str, float] = field(
        default_factory=lambda: {
            "reconstruction": 0.3,
            "continuation": 0.1,
            "question": 0.3,
            "cloze": 0.15,
            "needle": 0.15,
        }
    )
    chunk_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    max_chunks: int = 128
    max_memory_tokens: int = 1536
    join_texts: float = 0.0
    local_tokens: tuple[int, int] = (24, 64)
    prompt_lengths: tuple[int, ...] = ()
    max_candidate_rows: int = 512
    questions_per_example: int = 3
    question_chunk_sizes: tuple[int, ...] = (48, 64, 96, 128)
    hard_negatives: float = 0.3
    hard_kinds: dict[str, float] = field(default_factory=lambda: {"nearest": 0.5, "article": 0.5})
    not_there: float = 0.0
    read_whole: float = 0.0
    read_chunks: int = 8
    read_tokens: int = 2048
    earlier_turns: int = 60
    pool: int = 0
    pool_steps: int = 50
    kept_kv_mib: int = 0
    fill_chunks: float = 0.0
    needle_shapes: dict[str, float] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()
    distillation: dict[str, float] = field(default_factory=dict)
    teacher_memory: TeacherMemory = "gold"
    eval_every: int = 0
    eval_examples: int = 32
    eval_mix: dict[str, float] = field(default_factory=dict)
    held_out: float = 0.02

    def __post_init__(self) -> None:
        for name in ("steps", "examples_per_step", "max_chunks", "questions_per_example", "eval_examples"):
            _bounded(name, getattr(self, name), 1)
        if self.examples_per_pass is not None:
            _bounded("examples_per_pass", self.examples_per_pass, 1)
        if self.rank is not None:
            _bounded("rank", self.rank, 1)
        _bounded("reader_rank", self.reader_rank, 0)
        if self.fixed_candidates and not self.reader_rank:
            raise ConfigError("fixed_candidates leaves nothing to train without a reader; set reader_rank, such as 16")
        _bounded("max_candidate_rows", self.max_candidate_rows, 2)
        _bounded("eval_every", self.eval_every, 0)
        for name in ("read_chunks", "read_tokens"):
            _bounded(name, getattr(self, name), 1)
        for name, least in (("earlier_turns", 2), ("pool", 0), ("pool_steps", 1), ("kept_kv_mib", 0)):
            _bounded(name, getattr(self, name), least)
        for name in (
            "hard_negatives",
            "fill_chunks",
            "join_texts",
            "held_out",
            "final_rate",
            "not_there",
            "read_whole",
        ):
            _bounded(name, getattr(self, name), 0.0, 1.0)
        for name, literal in (("positions", Positions), ("schedule", Schedule), ("objective", Objective)):
            _one_of(name, getattr(self, name), literal)
        _one_of("teacher_memory", self.teacher_memory, TeacherMemory)
        _one_of("candidate_bias", self.candidate_bias, CandidateBias)
        _bounded("top_candidates", self.top_candidates, 0)
        _bounded("first_candidate_layer", self.first_candidate_layer, 0)
        _bounded("learning_rate", self.learning_rate, 0.0, above=True)
        _bounded("max_grad_norm", self.max_grad_norm, 0.0, above=True)
        _bounded("warmup_steps", self.warmup_steps, 0)
        self._check_sizes()
        self._check_objectives()
        self._check_stages()

    def at(self, step: int) -> Self:
        """Return the settings that examples of ``step`` (from 0) are drawn with."""
        for stage in self.stages:
            if step < stage["until"] * self.steps:
                return self._with(stage)
        return self

    def _with(self, stage: dict[str, Any]) -> Self:
        changes = {name: value for name, value in stage.items() if name != "until"}
        return dataclasses.replace(self, stages=(), **changes)

    def _check_sizes(self) -> None:
        for name in ("chunk_sizes", "question_chunk_sizes", "prompt_lengths"):
            sizes = getattr(self, name)
            if (not sizes and name != "prompt_lengths") or any(size < 1 for size in sizes):
                raise ConfigError(f"{name} must hold positive numbers; got {sizes}")
        if self.local_tokens[0] < 4 or self.local_tokens[1] < self.local_tokens[0]:
            raise ConfigError(f"local_tokens must be (least >= 4, most >= least); got {self.local_tokens}")

    def _check_objectives(self) -> None:
        if sum(self.mix.values()) <= 0:
            raise ConfigError(f"mix must hold weights of at least 0 with a positive sum; got {self.mix}")
        known = {
            **dict.fromkeys(("mix", "distillation", "eval_mix"), OBJECTIVES),
            "needle_shapes": NEEDLE_SHAPES,
            "hard_kinds": HARD_NEGATIVES,
        }
        for name, kinds in known.items():
            for kind, weight in getattr(self, name).items():
                if kind not in kinds:
                    raise ConfigError(f"{name} knows {', '.join(kinds)}; got {kind!r}")
                _bounded(f"{name}[{kind!r}]", weight, 0.0)

    def _check_stages(self) -> None:
        object.__setattr__(self, "stages", _tuples(self.stages))
        before = 0.0
        for stage in self.stages:
            unknown = sorted(set(stage) - {"until", *_STAGED})
            if unknown:
                raise ConfigError(f"a stage cannot change {', '.join(unknown)}; it knows {', '.join(_STAGED)}")
            if not before < stage.get("until", 0) <= 1:
                raise ConfigError(f"stages must have rising `until` between 0 and 1; got {stage.get('until')!r}")
            before = stage["until"]
            self._with(stage)  # its values are checked like any
