"""Find base weights, tokenizer and adapter by name, and read and write adapters.

What a base may be called is said in :mod:`focus_core.model.sources`. An adapter is a folder, a hub name, or nothing for
the one shipped with the package. Nothing is run here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from focus_core.config import FocusConfig
from focus_core.errors import AdapterError, AdapterMismatchError, BaseModelError, ConfigError
from focus_core.files import write_atomically
from focus_core.hardware import check_operators, choose_device, default_dtype
from focus_core.model.bases import base_of, first_line
from focus_core.model.candidate import CandidateAdapter, plain
from focus_core.model.families import BaseDecoder
from focus_core.model.sources import DEFAULT_FILE, DEFAULT_PACKAGE, Notice, source_of

ADAPTER_FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "adapters"


@dataclass(frozen=True)
class LoadedBase:
    """A frozen decoder with its tokenizer.

    Args:
        name: what the user asked for.
        fingerprint: hash of the weights, the same for every dtype they are loaded in.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str


@dataclass(frozen=True)
class AdapterInfo:
    """``focus_config.json`` of an adapter.

    Args:
        base: name of the base it was trained for.
        fingerprint: of that base's weights.
        focus: how memory is cut and read.
        trained: what the adapter has seen: chunk sizes, k range, steps, tokens.
        question_template: how a question is put to the model; ``{question}`` stands for it.
        system: system turn it was trained with, or ``None``.
        attribution_heads: (layer, head) pairs whose attention names the sources; empty means all.
        chunk_top_p: share of attention whose chunks an answer is read from, where a request does not say.
        not_there: what it says where memory does not hold the answer; empty if it was never trained to.
        reread: chunks that are read whole, where a request does not say.
        earlier_tokens: of a longer conversation, that stay local before the last user turn; older turns are memory. 0
            keeps as many as the window holds.
        rank: of its differences from the base's matrices; ``None`` for whole matrices.
        reader_rank: of the differences of local rows that read chunks whole; 0 leaves them the base's.
        support: constants of :func:`~focus_core.method.support.supported`; empty if they were never fitted.
    """

    base: str
    fingerprint: str
    focus: FocusConfig
    trained: dict[str, Any] = field(default_factory=dict)
    question_template: str = "{question}"
    system: str | None = None
    attribution_heads: tuple[tuple[int, int], ...] = ()
    chunk_top_p: float = 1.0
    not_there: str = ""
    reread: int = 0
    earlier_tokens: int = 0
    rank: int | None = None
    reader_rank: int = 0
    support: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "format": ADAPTER_FORMAT,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "focus": self.focus.to_dict(),
            "trained": self.trained,
            "question_template": self.question_template,
            "system": self.system,
            "attribution_heads": [list(pair) for pair in self.attribution_heads],
            "chunk_top_p": self.chunk_top_p,
            "not_there": self.not_there,
            "reread": self.reread,
            **({"earlier_tokens": self.earlier_tokens} if self.earlier_tokens else {}),
            **({} if self.rank is None else {"rank": self.rank}),
            **({"reader_rank": self.reader_rank} if self.reader_rank else {}),
            "support": list(self.support),
        }


# -- base -------------------------------------------------------------------------------------------------------


def load_base(
    name: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    notice: Notice = lambda text: None,
) -> LoadedBase:
    """Load a base.

    Args:
        name: a named base, hub name, folder, GGUF file, or ``None`` for the installed default.
        dtype: of the weights; :func:`default_dtype` if not given.
        device: the fastest there is (``cuda``, ``mps``, ``cpu``), if not given.
        quantize: ``int8`` or ``int4`` keeps the matrices of its layers in so many bits (torchao); such a base takes
            low-rank adapters without making a whole matrix.
        notice: told about long work.

    Raises:
        ConfigError: there is no such device, it lacks the dtype, or torchao is needed and not installed.
        BaseModelError: the weights cannot be found or read.
    """
    place = choose_device(device)
    kind = dtype or default_dtype(place)
    if place.type not in ("cpu", "cuda"):
        check_operators(place, kind)
    bits = _quantized(quantize, place)
    source = source_of(name, notice)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **bits)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _not_loadable(str(name or source), error) from error
    if quantize is None:
        model.to(place)  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return LoadedBase(model, tokenizer, str(name) if name else f"{DEFAULT_PACKAGE}/{DEFAULT_FILE}", fingerprint(model))


def _quantized(form: str | None, place: torch.device) -> dict[str, Any]:
    """Return what transformers' loader is told about bits and place; nothing for plain weights."""
    if form is None:
        return {}
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(weight_format(form)), "device_map": {"": place}}


def weight_format(form: str) -> Any:
    """Return torchao's configuration of ``int8`` or ``int4`` weights.

    Raises:
        ConfigError: another form, or torchao is not installed.
    """
    forms = ("int8", "int4")
    if form not in forms:
        raise ConfigError(f"quantize must be one of {', '.join(forms)}; got {form!r}")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ConfigError(f"quantize={form!r} needs torchao; run `pip install 'focusllm[quantized]'`") from error
    return Int8WeightOnlyConfig(version=2) if form == "int8" else Int4WeightOnlyConfig()


def load_tokenizer(name: str | Path | None = None, *, notice: Notice = lambda text: None) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer without its weights; takes the names that :func:`load_base` takes.

    Raises:
        BaseModelError: it cannot be found or read.
    """
    source = source_of(name, notice)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(str(name or source), error) from error
    return tokenizer


def _not_loadable(name: str, error: BaseException) -> BaseModelError:
    return BaseModelError(
        f"base model {name!r} cannot be loaded ({first_line(error)}); give one of `focusllm bases`, a folder with "
        "safetensors and a tokenizer, a .gguf file, or a hub name (needs the network or a filled hub cache)"
    )


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the weights: a strided sample of up to 4,096 bfloat16 values of every named tensor.

    A fine-tune or other quantisation changes it; loading the same weights in another dtype does not.
    """
    digest = hashlib.sha256()
    state = model.state_dict()
    wrapped = {name.partition(".base_layer.")[0] for name in state if ".base_layer." in name}
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".base_layer." in name}
    own |= {name: tensor for name, tensor in state.items() if not _stands_in(name, wrapped)}
    for name, tensor in sorted(own.items()):  # an attached adapter does not count
        if tensor.is_floating_point() and ".base_layer." not in name:
            flat = plain(tensor).reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)][:4096].to(torch.bfloat16).cpu()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _stands_in(name: str, modules: set[str]) -> bool:
    """Whether a tensor belongs to one of the modules, at any depth."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts)))


# -- adapter ----------------------------------------------------------------------------------------------------


def find_adapter(adapter: str | Path | None, base: LoadedBase) -> Path:
    """Return the folder of an adapter: given, on the hub, or shipped for this base.

    Raises:
        AdapterError: there is none; the message has the command that trains one.
    """
    if adapter is not None:
        folder = Path(adapter)
        if folder.is_dir():
            return folder
        if "/" in str(adapter) and not folder.is_absolute():
            return _download(str(adapter))
        raise AdapterError(f"no adapter folder at {str(adapter)!r}; check the path")
    row = base_of(base.name, base.fingerprint)
    if row is not None and row.adapter is not None:
        return SHIPPED / row.adapter
    raise AdapterError(
        f"no adapter is shipped for base {base.name!r} (weights {base.fingerprint[:12]}); train one with "
        f"`focusllm train --base {base.name} --data PATHS --output DIR`, name one with adapter=DIR, or pass "
        "adapter='untrained' to run with untrained candidates"
    )


def read_info(folder: Path) -> AdapterInfo:
    """Read ``focus_config.json``.

    Raises:
        AdapterError: absent, unreadable or of another format.
    """
    path = folder / "focus_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != ADAPTER_FORMAT:
            raise AdapterError(f"{path} is of another adapter format; this version reads {ADAPTER_FORMAT}")
        focus = FocusConfig.from_dict(values.pop("focus"))
        heads = tuple((int(layer), int(head)) for layer, head in values.pop("attribution_heads", []))
        support = tuple(map(float, values.pop("support", [])))
        return AdapterInfo(focus=focus, attribution_heads=heads, support=support, **values)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise AdapterError(f"{folder} is not an adapter folder ({first_line(error)})") from error


def attach(base: BaseDecoder, info: AdapterInfo, dtype: torch.dtype | None = None) -> CandidateAdapter:
    """Attach projections of the ranks that an adapter's settings name, ready for :func:`load_adapter`."""
    return CandidateAdapter(base, dtype, rank=info.rank, reader_rank=info.reader_rank)


def load_adapter(folder: Path, adapter: CandidateAdapter, base: LoadedBase, *, other_base: bool = False) -> AdapterInfo:
    """Copy a saved adapter into attached projections.

    It serves the weights it was trained for, and other quantisations of them that the table of bases declares.

    Args:
        folder: of the adapter.
        adapter: attached to ``base``.
        base: what it is to serve.
        other_base: serve any base whose shapes fit, a fine-tune for instance; what it gives there is not measured.

    Raises:
        AdapterMismatchError: it was trained for other weights.
        AdapterError: it cannot be read.
    """
    info = read_info(folder)
    if not other_base and not _same_weights(info, base):
        raise AdapterMismatchError(
            f"adapter {folder} was trained for {info.base!r} (weights {info.fingerprint[:12]}), but the base is "
            f"{base.name!r} (weights {base.fingerprint[:12]}); use that base, train an adapter with `focusllm train`, "
            "or try this one with other_base=True (--other-base)"
        )
    path = folder / "adapter.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read ({first_line(error)}); get the adapter again") from error
    adapter.load_state_dict(_decoded(tensors, adapter))
    return info


def _same_weights(info: AdapterInfo, base: LoadedBase) -> bool:
    """Return whether a base is what an adapter was trained for, or a declared quantisation of it."""
    if info.fingerprint == base.fingerprint:
        return True
    row = base_of(info.base, info.fingerprint)
    return row is not None and base_of(base.name, base.fingerprint) is row


def save_adapter(
    folder: Path, adapter: CandidateAdapter, info: AdapterInfo, *, compact: bool = False, rank: int | None = None
) -> None:
    """Write ``adapter.safetensors`` and ``focus_config.json``.

    Args:
        folder: created if absent.
        adapter: what to save.
        info: goes into ``focus_config.json``.
        compact: store each matrix as int8 difference from the base's, with one scale a row (a quarter of float32); of a
            low-rank adapter its thin matrices in bfloat16.
        rank: store the differences cut to this rank by SVD, in bfloat16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    thin, kind = rank or adapter.rank, torch.bfloat16 if compact or rank else torch.float32
    if thin is None:
        state = {key: value.float() for key, value in adapter.matrices().items()}
        tensors = _encoded(state, adapter.base_state_dict()) if compact else state
    else:
        state = adapter.thin_state() if rank in (None, adapter.rank) else adapter.differences(thin)
        tensors = {key: value.to(kind) for key, value in state.items()}
    tensors |= {key: value.to(kind) for key, value in adapter.reader_state().items()}
    data = save({key: value.contiguous().cpu() for key, value in tensors.items()})
    write_atomically(folder / "adapter.safetensors", data)
    values = json.dumps(replace(info, rank=thin, reader_rank=adapter.reader_rank).to_dict(), indent=2) + "\n"
    write_atomically(folder / "focus_config.json", values.encode())


def _encoded(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store ``W^c - W`` in int8 with a scale per output row; what training changed is small and smooth."""
    tensors = {}
    for key, value in state.items():
        change = value - base[key].float()
        scale = change.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127.0
        tensors[key] = torch.round(change / scale).to(torch.int8)
        tensors[f"{key}.scale"] = scale.squeeze(1)
    return tensors


def _decoded(tensors: dict[str, Tensor], adapter: CandidateAdapter) -> dict[str, Tensor]:
    if not any(key.endswith(".scale") for key in tensors):
        return tensors
    base, state = adapter.base_state_dict(), {}
    for key, value in tensors.items():
        if key.endswith(".scale"):
            continue
        if value.dtype == torch.int8 and key in base and value.shape == base[key].shape:
            scale = tensors[f"{key}.scale"].unsqueeze(1)
            value = base[key].float().cpu() + value.float() * scale
        state[key] = value
    return state


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["adapter.safetensors", "focus_config.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise AdapterError(
            f"no adapter folder and no hub adapter named {name!r} ({first_line(error)}); check the name"
        ) from error
