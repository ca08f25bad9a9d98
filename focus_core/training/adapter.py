"""Train an adapter from files to a folder that an engine loads: what ``focusllm train`` does, as one function.

It joins base, example stream, loop and the saved adapter's settings; each of them has its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from focus_core.candidate import CandidateAdapter
from focus_core.config import FocusConfig, TrainConfig
from focus_core.engine import sink_of
from focus_core.families import BaseDecoder
from focus_core.hub import AdapterInfo, LoadedBase, load_adapter, save_adapter
from focus_core.tokenization import TextTokenizer
from focus_core.training.data import SHORT_ANSWER, SYSTEM, ExampleStream, read_training_texts
from focus_core.training.loop import StepReport, train


def train_adapter(
    loaded: LoadedBase,
    data: Iterable[Path],
    output: Path,
    settings: TrainConfig,
    *,
    init: Path | None = None,
    chunk_size: int = 512,
    compact: bool = False,
    report: Callable[[StepReport], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train candidates for a base and save them; called again with the same settings it resumes.

    Args:
        loaded: the base; it is left as it was.
        data: files and folders, see :func:`read_training_texts`.
        output: gets ``log.jsonl``, ``checkpoint.safetensors`` and ``adapter/``.
        settings: the schedule.
        init: adapter folder to start from; copies of the base's projections if not given.
        chunk_size: the adapter's default when it is served.
        compact: save int8 differences instead of float32.
        report: called after every step.
        stop: asked after every step.

    Returns:
        The adapter's folder.

    Raises:
        CorpusError: no usable data.
        AdapterError: ``init`` or the checkpoint do not fit.
    """
    texts = read_training_texts(data)
    base, tokenizer = BaseDecoder(loaded.model), TextTokenizer(loaded.tokenizer)
    stream = ExampleStream(texts, tokenizer, settings)
    with CandidateAdapter(base, torch.float32) as adapter:
        if init is not None:
            load_adapter(init, adapter, loaded)
        sink = sink_of(loaded) if settings.sink else None
        done = train(base, adapter, stream, settings, output, sink=sink, report=report, stop=stop)
        window = min(4096, base.window)
        focus = FocusConfig(
            window=window,
            chunk_size=chunk_size,
            prompt_length=min(512, window // 4),
            positions=settings.positions,
            sink=settings.sink,
        )
        trained = {
            "steps": done.step,
            "tokens": done.tokens,
            "targets": done.targets,
            "chunk_sizes": list(settings.chunk_sizes),
            "max_chunks": min(settings.max_chunks, settings.max_memory_tokens // min(settings.chunk_sizes)),
        }
        template = f"{{question}}\n{SHORT_ANSWER}" if texts.questions else "{question}"
        info = AdapterInfo(loaded.name, loaded.fingerprint, focus, trained, template, SYSTEM)
        save_adapter(output / "adapter", adapter, info, compact=compact)
    return output / "adapter"
