"""Turn a trained adapter into the compact int8 form and measure what that costs.

The loss of the weights as they are and of the compact form, read back from disk, is taken on the same examples; both
stand in ``export.json`` beside the adapter. The source folder is not changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from focus_core.candidate import CandidateAdapter
from focus_core.engine import sink_of
from focus_core.families import BaseDecoder
from focus_core.hub import AdapterInfo, LoadedBase, load_adapter, save_adapter
from focus_core.store import write_atomically
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


def export_adapter(loaded: LoadedBase, source: Path, output: Path, examples: Sequence[Example] = ()) -> Export:
    """Write the adapter in ``source`` in compact form to ``output``.

    Args:
        loaded: the base it was trained for; it is left as it was.
        source: an adapter folder.
        output: the new folder.
        examples: what both forms are measured on; none skips the comparison.

    Raises:
        AdapterMismatchError: the adapter belongs to other weights.
        AdapterError: it cannot be read.
    """
    base = BaseDecoder(loaded.model)
    with CandidateAdapter(base, torch.float32) as adapter:
        info = load_adapter(source, adapter, loaded)
        return write_compact(loaded, base, adapter, info, output, examples)


def write_compact(
    loaded: LoadedBase,
    base: BaseDecoder,
    adapter: CandidateAdapter,
    info: AdapterInfo,
    output: Path,
    examples: Sequence[Example] = (),
) -> Export:
    """Save an attached adapter in compact form and read it back into ``adapter``; see :func:`export_adapter`."""
    sink = sink_of(loaded) if info.focus.sink else None
    before = measure_loss(base, adapter, examples, sink, info.focus) if examples else None
    save_adapter(output, adapter, info, compact=True)
    load_adapter(output, adapter, loaded)
    after = measure_loss(base, adapter, examples, sink, info.focus) if examples else None
    export = Export(output, (output / "adapter.safetensors").stat().st_size, before, after)
    write_atomically(output / "export.json", (json.dumps(export.to_dict(), indent=2) + "\n").encode())
    return export
