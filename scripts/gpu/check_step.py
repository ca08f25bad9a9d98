"""Check chunk attention on a card against the reference, count a step's kernels, and time steps. JSON lines on stdout.

    python scripts/gpu/check_step.py            # on a CUDA device, about a minute
    python scripts/gpu/check_step.py --smoke    # the same calls on the CPU, with a tiny base

Set TRITON_INTERPRET=0 where tests have set it. Weights are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from focus_core.config import FocusConfig
from focus_core.method import attention
from focus_core.method.encoding import kv_shape
from focus_core.method.kv import ChunkKV
from focus_core.method.reading import Reading
from focus_core.method.slabs import Slab
from focus_core.method.state import MemoryState
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.text.chunking import Chunk, Span

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SHAPE | {"vocab_size": 320, "hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16}
FORMATS = ("base", "int8", "int4")


def say(**facts: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(facts), flush=True)


def filled(base: BaseDecoder, lengths: list[int], written: Any) -> ChunkKV:
    """Chunk KV of random numbers."""
    shape = kv_shape(base, written)
    kv = ChunkKV.allocate(shape, lengths)
    size = (len(lengths), shape.kv_heads, max(lengths), shape.head_dim)
    for layer in range(shape.layers):
        kv.write(layer, *(torch.randn(size, dtype=base.dtype, device=base.device) for _ in range(2)))
    return kv


def check_kernel(base: BaseDecoder, written: str) -> None:
    """The kernel against the same numbers without it."""
    kv = filled(base, [513, 300, 130, 70, 5, 2], written)
    query = torch.randn(kv.size, base.num_heads, 2, base.head_dim, dtype=base.dtype, device=base.device)
    before = attention._KERNELS
    found = attention.attend_chunks(query, kv.layer(0), 0.125)
    used, attention._KERNELS = attention._KERNELS, ()
    plain = attention.attend_chunks(query, kv.layer(0), 0.125)
    attention._KERNELS = before if used else ()
    difference = float((found.float() - plain.float()).abs().max())
    say(check="kernel against reference", format=written, difference=difference, kernel=base.device.type in used)
    assert difference < 0.05, difference


def measure(base: BaseDecoder, adapter: CandidateAdapter, chunks: int, size: int, written: str, steps: int) -> None:
    """Time a question of 40 tokens and the steps after it."""
    made = tuple(Chunk(tuple([5 + index % 200] * size), (Span(str(index), 0, 1),)) for index in range(chunks))
    kv = filled(base, [size + 1] * chunks, written)
    state = MemoryState({}, made, (Slab.of([(chunk,) for chunk in made], kv),))
    focus = FocusConfig(window=4096, chunk_size=512, top_candidates=8, kv_format=written)  # type: ignore[arg-type]
    reading = Reading(base, adapter, focus, state, 1, max_tokens=4 * steps)
    question = seconds(base, lambda: reading.begin(list(range(10, 50))))
    for _ in range(2):
        reading.step(30)
    times = sorted(seconds(base, lambda: reading.step(30)) for _ in range(steps))
    facts: dict[str, Any] = {"question_ms": question * 1e3, "step_ms": times[len(times) // 2] * 1e3}
    if base.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            reading.step(30)
        facts["kernels"] = sum(event.count for event in profiled.key_averages())
        facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    say(check="step", chunks=chunks, size=size, format=written, kv_gib=kv.nbytes / 2**30, **facts)


def seconds(base: BaseDecoder, work: Callable[[], object]) -> float:
    """Time some work, the device's included."""
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny base on the CPU")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    device, dtype = ("cpu", torch.float32) if smoke else ("cuda", torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**(TINY if smoke else SHAPE))).to(device, dtype).eval().requires_grad_(False)
    base = BaseDecoder(model)
    say(device="cpu" if smoke else torch.cuda.get_device_name(), torch=torch.__version__)
    with CandidateAdapter(base) as adapter, torch.no_grad():
        for written in FORMATS:
            check_kernel(base, written)
        sizes = [(4, 60)] if smoke else [(64, 512), (256, 512), (800, 512)]
        for chunks, size in sizes:
            for written in FORMATS:
                measure(base, adapter, chunks, size, written, 2 if smoke else 10)


if __name__ == "__main__":
    main()
