"""Train an adapter from files to a folder that an engine loads: what ``focusllm train`` does, as one function.

It joins base, example stream, loop and the saved adapter's settings; each of them has its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from focus_core.config import FocusConfig, TrainConfig
from focus_core.engine import FocusEngine
from focus_core.errors import EmptyCorpusError
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.fitting import fitted, sink_of
from focus_core.model.hub import AdapterInfo, LoadedBase, load_adapter, read_info, save_adapter
from focus_core.store.encoder import check_sliding_window
from focus_core.text.tokenization import TextTokenizer
from focus_core.training.card import write_card
from focus_core.training.checkpoint import Totals
from focus_core.training.data import NOT_THERE, SHORT_ANSWER, SYSTEM, ExampleStream
from focus_core.training.export import write_compact
from focus_core.training.loop import StepReport, train
from focus_core.training.objectives import Example
from focus_core.training.processes import Processes
from focus_core.training.texts import TrainingTexts, data_fingerprint, hash_files, hold_out, read_training_texts


def train_adapter(
    loaded: LoadedBase,
    data: Iterable[Path],
    output: Path,
    settings: TrainConfig,
    *,
    init: Path | None = None,
    chunk_size: int = 512,
    compact: bool = False,
    metric: Callable[[FocusEngine], Mapping[str, float]] | None = None,
    processes: Processes | None = None,
    report: Callable[[StepReport], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
    finish: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Totals:
    """Train candidates for a base and save them; called again with the same settings it resumes.

    Args:
        loaded: the base; it is left as it was.
        data: files and folders, see :func:`read_training_texts`.
        output: gets ``log.jsonl``, ``checkpoint.safetensors``, ``adapter/`` and, where a held-out loss is measured,
            ``best/``.
        settings: the schedule.
        init: adapter folder to start from; copies of the base's projections if not given.
        chunk_size: the adapter's default when it is served.
        compact: save int8 differences (bfloat16 at low rank) instead of float32, and measure both forms on the held-out
            examples.
        metric: a measure of one's own, such as the accuracy of a task, of the adapter as it would be served; called
            where the held-out loss is measured, and logged beside it.
        processes: those that run this together; one alone if not given.
        report: called after every step.
        stop: asked after every step.
        finish: see :func:`~focus_core.training.loop.train`.
        notice: told about a damaged checkpoint.

    Returns:
        What this run and those it resumed did.

    Raises:
        CorpusError: no usable data.
        AdapterError: ``init`` does not fit, or the checkpoint in ``output`` is of a run with another base, other data,
            settings or ``init``; nothing has been written then.
    """
    processes, data = processes or Processes(loaded.model.device), list(data)
    base = BaseDecoder(loaded.model)
    if init is not None and not settings.reader_rank:
        settings = replace(settings, reader_rank=read_info(init).reader_rank)  # its examples are drawn for it
    stream, held_out = _streams(read_training_texts(data), TextTokenizer(loaded.tokenizer), settings)
    focus = _focus(base, settings, chunk_size)  # refuses a chunk size the base cannot serve before any work
    with CandidateAdapter(base, torch.float32, rank=settings.rank, reader_rank=settings.reader_rank) as adapter:
        before = load_adapter(init, adapter, loaded) if init is not None else None

        def info(totals: Totals) -> AdapterInfo:
            asked = stream.questions or settings.mix.get("cloze")
            template = f"{{question}}\n{SHORT_ANSWER}" if asked else "{question}"
            trained = _trained(settings, totals, before.trained if before is not None else {})
            heads = before.attribution_heads if before is not None else ()
            declines = settings.not_there > 0 or (before is not None and bool(before.not_there))
            absent = NOT_THERE if declines else ""
            return AdapterInfo(
                loaded.name,
                loaded.fingerprint,
                focus,
                trained,
                template,
                SYSTEM,
                heads,
                chunk_top_p=before.chunk_top_p if before is not None else 1.0,
                not_there=absent,
                reread=before.reread if before is not None else 0,
            )

        def measured(totals: Totals) -> Mapping[str, float]:
            return {} if metric is None else metric(FocusEngine(loaded, info(totals), adapter, base=base))

        done = train(
            base,
            adapter,
            stream,
            settings,
            output,
            sink=sink_of(loaded) if settings.sink else None,
            held_out=held_out,
            keep_best=lambda totals: save_adapter(output / "best", adapter, info(totals)),
            metric=measured,
            processes=processes,
            report=report,
            stop=stop,
            finish=finish,
            origin=_origin(loaded, data, init),
            notice=notice,
        )
        if processes.is_main:
            if compact:
                write_compact(loaded, base, adapter, info(done), output / "adapter", held_out)
            else:
                save_adapter(output / "adapter", adapter, info(done))
                write_card(output / "adapter")
        processes.accelerator.wait_for_everyone()
    return done


def _origin(loaded: LoadedBase, data: Sequence[Path], init: Path | None) -> dict[str, str]:
    """Return what a checkpoint must not be mixed with: hashes of the base, of the data and of the adapter before."""
    before = hash_files([init / "adapter.safetensors"]) if init is not None else ""
    return {"base": loaded.fingerprint, "data": data_fingerprint(data), "init": before}


def _streams(
    texts: TrainingTexts, tokenizer: TextTokenizer, settings: TrainConfig
) -> tuple[ExampleStream, list[Example]]:
    """Return the stream to train on, and the fixed examples of texts that it never sees."""
    if not settings.eval_every:
        return ExampleStream(texts, tokenizer, settings), []
    kept, held = hold_out(texts, settings.held_out, settings.seed)
    stream = ExampleStream(kept, tokenizer, settings)
    measured = replace(settings, objective="dense", mix=settings.eval_mix or settings.mix)
    try:
        unseen = ExampleStream(held, tokenizer, measured, others=(*held.questions, *kept.questions))
    except EmptyCorpusError as error:
        raise EmptyCorpusError(
            f"too little data to hold some out for eval_every={settings.eval_every} (held_out={settings.held_out}); "
            "give more, or set eval_every to 0"
        ) from error
    return stream, [unseen.fixed(index) for index in range(settings.eval_examples)]


def _focus(base: BaseDecoder, settings: TrainConfig, chunk_size: int) -> FocusConfig:
    """Return how the adapter will be served; raises where the base cannot serve it or see all of a training row."""
    window = min(4096, base.window)
    prompt = max(settings.prompt_lengths, default=min(512, window // 4))
    focus = FocusConfig(
        window=window,
        chunk_size=chunk_size,
        prompt_length=prompt,
        positions=settings.positions,
        sink=settings.sink,
        candidate_bias=settings.candidate_bias,
        top_candidates=settings.top_candidates,
        first_candidate_layer=settings.first_candidate_layer,
    )
    trained = max(chunk_size, *settings.chunk_sizes, *settings.question_chunk_sizes)
    check_sliding_window(base, replace(focus, chunk_size=min(trained, focus.largest_chunk)))
    return fitted(focus, base)


def _trained(settings: TrainConfig, totals: Totals, before: dict[str, Any]) -> dict[str, object]:
    """Return what ``focus_config.json`` tells of the training, that of the adapter it started from included."""
    most = min(settings.max_chunks, settings.max_memory_tokens // min(settings.chunk_sizes))
    sizes = {*settings.chunk_sizes, *settings.question_chunk_sizes, *before.get("chunk_sizes", ())}
    return {
        "steps": totals.step + before.get("steps", 0),
        "tokens": totals.tokens + before.get("tokens", 0),
        "targets": totals.targets + before.get("targets", 0),
        "chunk_sizes": sorted(sizes),
        "max_chunks": max(most, before.get("max_chunks", 0)),
        **({"held_out_loss": totals.best, "held_out_step": totals.best_step} if totals.best is not None else {}),
    }
