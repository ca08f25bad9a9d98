"""Share tiny random models of every family, a byte-level tokenizer, and the one real model."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; set it to 0 where there is a GPU

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from focus_core import cli
from focus_core.config import FocusConfig
from focus_core.engine import FocusEngine
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import FAMILIES, BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint
from focus_core.model.tool_calls import ToolCall, ToolCallParser
from focus_core.session.engines import MemoryHolder

SHARED = Path(__file__).parents[2] / "shared"
VOCABULARY = 320
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models: threads cost more than they give


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of evaluation texts; tests that need it skip where it is not."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the evaluation texts in {folder}, which are not on this machine")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See :func:`byte_level_tokenizer`."""
    return byte_level_tokenizer()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog ate the hat. " * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of letters that spells every other character in byte tokens, as SentencePiece's with fallback do."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]:
        vocabulary[token] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_model(family: str, *, layers: int = 3, window: int = 512, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random decoder of ``family``: hidden 32, 4 heads, 2 KV heads where the family groups them."""
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": window,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "use_cache": True,
    }
    if family == "opt":
        for name in ("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window"):
            values.pop(name)
        values |= {"ffn_dim": 48, "word_embed_proj_dim": 16}
    if family == "gpt_neox":
        for name in ("num_key_value_heads", "head_dim", "sliding_window"):
            values.pop(name)
        values |= {"attention_bias": True}
    if family == "gemma2":
        values |= {"sliding_window": 4096, "query_pre_attn_scalar": 8}
    if family == "phi3":
        values.pop("head_dim")
    if family == "gemma3_text":
        values |= {"sliding_window": 4096, "query_pre_attn_scalar": 8}
        values |= {"layer_types": [("sliding_attention", "full_attention")[n % 2] for n in range(layers)]}
    if family == "smollm3":
        values |= {"no_rope_layers": [n % 2 for n in range(layers)]}  # 1 rotates
        values.pop("head_dim")
    if family == "olmo2":
        values.pop("head_dim")
    if family == "granite":
        values.pop("head_dim")
        values |= {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4}
        values |= {"logits_scaling": 2.0}
    if family == "ministral":
        values |= {"sliding_window": 4096}
        values |= {"layer_types": [("sliding_attention", "full_attention")[n % 2] for n in range(layers)]}
    if family == "ministral3":
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        values |= {"rope_parameters": {**yarn, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**values, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that no bias or norm is trivial
    return model.eval().requires_grad_(False)


def perturb(adapter: CandidateAdapter, seed: int = 1, scale: float = 0.1) -> None:
    """Move candidate projections away from their copies, so that tests can tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    # the reader's come last, so that candidates move alike without one
    for parameter in adapter.trainable_parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def parse_tool_calls(text: str, request: str | None = None) -> tuple[str, tuple[ToolCall, ...]]:
    """Split a model's whole output into its text and the tool calls in it."""
    parser = ToolCallParser(request)
    deltas = [*parser.push(text), *parser.finish()]
    return "".join(delta.text for delta in deltas).strip(), tuple(parser.calls)


EngineFactory = Callable[..., FocusEngine]
CommandLine = Callable[..., tuple[int, str, str]]


def random_engine(
    tokenizer: PreTrainedTokenizerFast,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    model: torch.nn.Module | None = None,
    scale: float = 0.1,
    heads: tuple[tuple[int, int], ...] = (),
    system: str | None = None,
    rank: int | None = None,
    reader_rank: int = 0,
    **focus: object,
) -> FocusEngine:
    """An engine on a tiny model; the same one for the same arguments."""
    model = (model or tiny_model(family)).to(dtype)
    loaded = LoadedBase(model, tokenizer, f"tiny-{family}", fingerprint(model))
    positions = "shared" if FAMILIES[family].rotary == "half" else "ordered"
    settings = {"window": 256, "chunk_size": 32, "prompt_length": 64, "positions": positions} | focus
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, rank=rank, reader_rank=reader_rank)
    perturb(adapter, scale=scale)
    info = AdapterInfo(loaded.name, loaded.fingerprint, FocusConfig(**settings), attribution_heads=heads, system=system)
    return FocusEngine(loaded, info, adapter, base=base)


@pytest.fixture
def make_engine(tokenizer: PreTrainedTokenizerFast) -> Iterator[EngineFactory]:
    """Build engines on tiny models; ``make_engine("llama", chunk_size=16)``."""
    made: list[FocusEngine] = []

    def make(*arguments: Any, **options: Any) -> FocusEngine:
        made.append(random_engine(tokenizer, *arguments, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def working_threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Threads in which documents are read for a call, or layers run, from here on."""
    found: set[int] = set()

    def noting(own: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object, **options: object) -> object:
            found.add(threading.get_ident())
            return own(*arguments, **options)

        return noted

    monkeypatch.setattr(MemoryHolder, "hold", noting(MemoryHolder.hold))
    monkeypatch.setattr(BaseDecoder, "logits", noting(BaseDecoder.logits))
    return found


@pytest.fixture(scope="session")
def real_engine() -> FocusEngine:
    """The default base with the shipped adapter; loaded once."""
    from focus_core.errors import BaseModelError
    from focus_core.model.sources import default_gguf

    try:
        default_gguf()
    except BaseModelError as error:
        pytest.skip(str(error))
    torch.set_num_threads(os.cpu_count() or 1)
    return FocusEngine.from_pretrained()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny llama and its tokenizer, as a user's own base would be."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or changes the store of whoever runs it."""
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path_factory.getbasetemp() / "nobodys-store"))


@pytest.fixture
def run(base_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Run ``focusllm ARGS``; return (exit code, stdout, stderr)."""

    def invoke(*arguments: object, model: bool = True, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(cli.note, "width", 240)
        argv = ["focusllm", *map(str, arguments)]
        if model:
            argv += ["--base", base_folder, "--adapter", "untrained"]
        monkeypatch.setattr(sys, "argv", argv)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke
