"""Turn trained adapters into the one that is served: between two of them, and in a compact form, int8 or low rank.

The loss of the weights as they are and of the compact form, read back from disk, is taken on the same examples; both
stand in ``export.json`` beside the adapter. The source folders are not changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from focus_core.errors import AdapterMismatchError, ConfigError
from focus_core.files import write_atomically
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.fitting import sink_of
from focus_core.model.hub import AdapterInfo, LoadedBase, attach, load_adapter, read_info, save_adapter
from focus_core.training.card import write_card
from focus_core.training.heldout import Loss, measure_loss
from focus_core.training.objectives import Example


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Args:
        folder: the compact adapter.
        nbytes: size of its weights.
        before: loss of the weights as they were, ``None`` without examples.
        after: loss of the compact form.
    """

    folder: Path
    nbytes: int
    before: Loss | None
    after: Loss | None

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON types."""
        values = dataclasses.asdict(self)
        values.pop("folder")
        return values


def export_adapter(
    loaded: LoadedBase, source: Path, output: Path, examples: Sequence[Example] = (), *, rank: int | None = None
) -> Export:
    """Write the adapter in ``source`` in compact form to ``output``.

    Args:
        loaded: the base it was trained for; it is left as it was.
        source: an adapter folder.
        output: the new folder.
        examples: what both forms are measured on; none skips the comparison.
        rank: cut the differences from the base to this rank (SVD, bfloat16); int8 of full rank if not given.

    Raises:
        ConfigError: the rank is none.
        AdapterMismatchError: the adapter belongs to other weights.
        AdapterError: it cannot be read.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1; got {rank}")
    base = BaseDecoder(loaded.model)
    with attach(base, read_info(source), torch.float32) as adapter:
        info = load_adapter(source, adapter, loaded)
        return write_compact(loaded, base, adapter, info, output, examples, rank=rank)


def write_compact(
    loaded: LoadedBase,
    base: BaseDecoder,
    adapter: CandidateAdapter,
    info: AdapterInfo,
    output: Path,
    examples: Sequence[Example] = (),
    *,
    rank: int | None = None,
) -> Export:
    """Save an attached adapter in compact form, detach it and measure what was written; see :func:`export_adapter`."""
    sink = sink_of(loaded) if info.focus.sink else None
    before = measure_loss(base, adapter, examples, sink, info.focus) if examples else None
    save_adapter(output, adapter, info, compact=True, rank=rank)
    adapter.detach()
    after = None
    if examples:
        with attach(base, read_info(output), torch.float32) as written:
            load_adapter(output, written, loaded)
            after = measure_loss(base, written, examples, sink, info.focus)
    export = Export(output, (output / "adapter.safetensors").stat().st_size, before, after)
    write_atomically(output / "export.json", (json.dumps(export.to_dict(), indent=2) + "\n").encode())
    write_card(output)
    return export


def interpolate_adapters(loaded: LoadedBase, first: Path, second: Path, output: Path, share: float) -> AdapterInfo:
    """Write the adapter whose matrices are ``(1 - share) * first + share * second``.

    Between an adapter and one trained on from it, much of what the later training gained often comes with little of
    what it lost (weight-space ensembles, arXiv 2109.01903). A reader is the second's.

    Args:
        loaded: the base of both; it is left as it was.
        first: an adapter folder.
        second: an adapter folder, usually trained on from ``first``; its settings and counts are kept.
        output: the new folder, float32.
        share: of the second, 0 to 1.

    Raises:
        ConfigError: ``share`` is out of range.
        AdapterMismatchError: the two differ in what decoding must agree on, or belong to other weights.
        AdapterError: one cannot be read.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"share must be between 0 (the first adapter) and 1 (the second); got {share}")
    base, ranks = BaseDecoder(loaded.model), [read_info(folder).reader_rank for folder in (first, second)]
    with CandidateAdapter(base, torch.float32, reader_rank=ranks[0]) as adapter:
        before = load_adapter(first, adapter, loaded)
        start = {key: value.clone() for key, value in adapter.matrices().items()}
    with CandidateAdapter(base, torch.float32, reader_rank=ranks[1]) as adapter:
        info = load_adapter(second, adapter, loaded)
        for key, value in info.focus.to_dict().items():
            if key != "chunk_size" and value != (other := before.focus.to_dict()[key]):
                raise AdapterMismatchError(
                    f"{first} was trained with {key}={other!r}, {second} with {value!r}; "
                    "interpolate between adapters trained with the same settings"
                )
        end = adapter.matrices()
        adapter.load_state_dict({key: (1 - share) * start[key] + share * end[key] for key in start})
        save_adapter(output, adapter, info)
    return info
