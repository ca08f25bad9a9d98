"""Measure training of a 7B or 8B base on one card: peak memory, tokens a second, hours to 14M tokens.

The weights are random, of the shape that is named, made layer by layer and kept in 8 or 4 bits, so that nothing larger
than the quantised base is ever there; candidates are of low rank, with gradient checkpointing. ``--most-gib`` holds the
run to a smaller card's memory. ``--smoke`` runs the same code on a tiny shape on the CPU.

    python scripts/gpu/large_base.py --shape 8b --bits int8 --most-gib 23.5 --output large.json
    python scripts/gpu/large_base.py --smoke
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from focus_core.config import TrainConfig  # noqa: E402
from focus_core.errors import ConfigError  # noqa: E402
from focus_core.model.hub import LoadedBase, weight_format  # noqa: E402
from focus_core.training.adapter import train_adapter  # noqa: E402
from focus_core.training.loop import StepReport  # noqa: E402
from tests.conftest import byte_level_tokenizer  # noqa: E402

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "tiny": {"hidden_size": 128, "intermediate_size": 192, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 512},
}
GOAL = 14_000_000  # input tokens of the recipe of the 0.5B base


def make_base(shape: str, bits: str | None, device: torch.device) -> PreTrainedModel:
    """Return a random decoder whose layers are quantised one by one as they are made."""
    size = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    for part in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        part.to_empty(device=device)
        for name, parameter in part.named_parameters():
            torch.nn.init.ones_(parameter) if "norm" in name or part is model.model.norm else torch.nn.init.normal_(
                parameter, std=0.02
            )
        if bits is not None and part in list(model.model.layers):
            from torchao.quantization import quantize_

            quantize_(part, weight_format(bits))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def settings(steps: int, rank: int, tiny: bool) -> TrainConfig:
    """Return the recipe of the 0.5B base at low rank, with fewer examples a step and gradient checkpointing."""
    values = json.loads((ROOT / "docs/recipes/qwen2.5-coder-0.5b.json").read_text(encoding="utf-8"))
    values |= {"steps": steps, "rank": rank, "gradient_checkpointing": True, "examples_per_step": 4}
    values |= {"examples_per_pass": 1, "stages": [], "warmup_steps": 1, "mix": {"reconstruction": 0.5, "needle": 0.5}}
    if tiny:
        values |= {"chunk_sizes": [16, 32], "max_memory_tokens": 128, "max_chunks": 4, "local_tokens": [12, 24]}
        values |= {"max_candidate_rows": 64, "learning_rate": 0.01}
    return TrainConfig.from_dict(values)


def main() -> None:
    """Measure, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--bits", choices=("int8", "int4", "none"), default="int8")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--most-gib", type=float, help="of the card's memory")
    parser.add_argument("--output", type=Path, default=Path("large.json"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.rank, options.steps = "tiny", 4, 3
    bits = None if options.bits == "none" else options.bits
    try:
        weight_format(bits or "int8")
    except ConfigError as error:
        if not options.smoke:
            raise
        print(f"in bfloat16, as {error}")
        bits = None
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    if device.type == "cuda" and options.most_gib:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.most_gib * 2**30 / whole), device)
    measured = measure(options, bits, device)
    options.output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


def measure(options: argparse.Namespace, bits: str | None, device: torch.device) -> dict[str, Any]:
    """Train a few steps and return what they took; the first step, which chooses kernels, does not count."""
    started = time.monotonic()
    model = make_base(options.shape, bits, device)
    loaded = LoadedBase(model, byte_level_tokenizer(), f"random-{options.shape}", "random")
    made, reports = time.monotonic() - started, []

    def report(step: StepReport) -> None:
        reports.append(step)
        print(f"step {step.step}: loss {step.loss:.3f}, {step.tokens:,} tokens, {step.seconds:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(0)
        words = [
            "the",
            "cat",
            "sat",
            "on",
            "a",
            "mat",
            "and",
            "some",
            "dog",
            "ate",
            "his",
            "hat",
            "while",
            "birds",
            "sang",
        ]
        (folder / "text.txt").write_text(" ".join(rng.choices(words, k=40_000)) + ".", encoding="utf-8")
        config = settings(options.steps, options.rank, options.shape == "tiny")
        chunk = 64 if options.shape == "tiny" else 512
        train_adapter(loaded, [folder / "text.txt"], folder / "run", config, chunk_size=chunk, report=report)
        size = (folder / "run/adapter/adapter.safetensors").stat().st_size
    first, last = reports[0], reports[-1]
    speed = (last.tokens - first.tokens) / max(1e-9, last.seconds - first.seconds)
    cuda = device.type == "cuda"
    return {
        "shape": options.shape,
        "bits": bits or "bfloat16",
        "rank": options.rank,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if cuda else None,
        "seconds_to_make": round(made, 1),
        "tokens_per_second": round(speed, 1),
        "hours_to_14M_tokens": round(GOAL / speed / 3600, 2),
        "adapter_megabytes_float32": round(size / 1e6, 2),
        "loss": [round(step.loss, 3) for step in reports],
    }


if __name__ == "__main__":
    main()
