"""Choose a device and ask it what it has: free memory, operators, whether an error means that there was not enough."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.errors import ConfigError


def devices() -> list[str]:
    """Return the kinds of devices that this machine has, the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, found in there.items() if found]


def choose_device(wanted: str | torch.device | None = None) -> torch.device:
    """Return the device that is asked for, or the fastest there is.

    Raises:
        ConfigError: there is no such device; the message has those that there are.
    """
    there = devices()
    try:
        device = torch.device(wanted or there[0])
    except RuntimeError as error:
        raise ConfigError(f"no device is called {wanted!r}; this machine has {', '.join(there)}") from error
    if device.type not in there:
        built: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        reason = " (this torch is built without CUDA)" if device.type == "cuda" and not built else ""
        raise ConfigError(f"device {wanted} is not there{reason}; this machine has {', '.join(there)}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise ConfigError(f"device {wanted} is not there; this machine has {count} of {device.type}, numbered from 0")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it fast, a type that it has elsewhere: torch is asked."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    fast = device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def check_operators(device: torch.device, dtype: torch.dtype) -> None:
    """Try what reading and sampling need, once and small, so that a lack shows before a long read.

    Raises:
        ConfigError: the device lacks the type or an operator.
    """
    for name, operator in _OPERATORS.items():
        try:
            operator(torch.ones(1, 2, 3, 8, device=device).to(dtype))
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{device.type} cannot run {name} in {dtype_name(dtype)} ({str(error).splitlines()[0]}); use another "
                "dtype, a newer torch, or device='cpu'"
            ) from error


def _draw(tensor: Tensor) -> Tensor:
    generator = torch.Generator(tensor.device).manual_seed(0)
    return torch.multinomial(torch.softmax(tensor.flatten().float(), 0), 1, generator=generator)


_OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: F.scaled_dot_product_attention(x.repeat(1, 2, 1, 1), x, x, is_causal=True, enable_gqa=True),
    "matrix products": lambda x: x @ x.transpose(-1, -2),
    "logsumexp": lambda x: torch.logsumexp(x.float(), dim=-1),
    "topk": lambda x: x.float().topk(2, dim=-1).values,
    "scatter": lambda x: torch.zeros_like(x).scatter(-1, x.float().topk(2, dim=-1).indices, x[..., :2]),
    "rotations": lambda x: x.float().cos() * x.float().sin(),
    "sampling": _draw,
}


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on ``device``; mps shares the machine's."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
