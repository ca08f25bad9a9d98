"""Import candidate projections that the paper's published code trained, as an adapter of ours.

That code saves a whole decoder in which each attention module has ``beacon_q_proj`` and its siblings beside the base's
own projections (github.com/leezythu/FocusLLM calls candidates beacons); only these are taken. It numbers candidates
0..k-1, reads the local context again at every step and puts no sink in front of a chunk, so the adapter says the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from focus_core.config import FocusConfig
from focus_core.errors import AdapterError
from focus_core.model.bases import first_line
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, save_adapter

_KEY = re.compile(r"layers\.(\d+)\.self_attn\.beacon_([qkvo])_proj\.weight$")


def import_published(loaded: LoadedBase, checkpoint: Path, output: Path, *, chunk_size: int = 2048) -> AdapterInfo:
    """Write an adapter from a checkpoint of the published code.

    Args:
        loaded: the base it was trained on; it is left as it was.
        checkpoint: folder with ``*.safetensors`` or ``pytorch_model*.bin`` files, whole or the trained weights alone.
        output: the new folder, float32.
        chunk_size: the adapter's default when it is served; the published inference uses 2,048.

    Returns:
        The adapter's settings.

    Raises:
        AdapterError: the folder holds no candidate projections, or cannot be read.
        AdapterMismatchError: they do not fit the base.
    """
    base = BaseDecoder(loaded.model)
    with CandidateAdapter(base, torch.float32) as adapter:
        found = {f"layers.{layer}.{role}_proj.weight": tensor for layer, role, tensor in _projections(checkpoint)}
        if not found:
            raise AdapterError(
                f"{checkpoint} holds no candidate projections (model.layers.N.self_attn.beacon_q_proj.weight and its "
                "siblings); give a folder that the published FocusLLM code saved"
            )
        adapter.load_state_dict(adapter.base_state_dict() | found)  # a role that was not trained is the base's own
        window = min(4096, base.window)
        prompt = min(512, window // 4)
        focus = FocusConfig(
            window=window,
            chunk_size=min(chunk_size, window - prompt - 1),
            prompt_length=prompt,
            positions="ordered",
            local_mode="exact",
            sink=False,
        )
        info = AdapterInfo(loaded.name, loaded.fingerprint, focus, {"imported_from": checkpoint.name})
        save_adapter(output, adapter, info)
    return info


def _projections(folder: Path) -> Iterator[tuple[int, str, Tensor]]:
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("pytorch_model*.bin"))]
    for path in files:
        try:
            for key, tensor in _tensors(path):
                match = _KEY.search(key)
                if match is not None:
                    yield int(match[1]), match[2], tensor
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise AdapterError(f"{path} cannot be read ({first_line(error)}); get the checkpoint again") from error


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
        return
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if _KEY.search(key):
                yield key, file.get_tensor(key)
