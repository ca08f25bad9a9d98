"""Share a tiny engine with a window wide enough for tools, and an engine whose words are written beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from focus_core.config import FocusConfig
from focus_core.engine import FocusEngine
from focus_core.generation import Generation
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.chat import Message, Tool
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint
from focus_core.model.tool_calls import ToolCall, write_tool_call
from tests.conftest import byte_level_tokenizer, perturb, tiny_model


def tiny_engine(kind: type[FocusEngine] = FocusEngine, *, seed: int = 0, chunk_size: int = 64) -> FocusEngine:
    """A random model with a window of 8,192 tokens."""
    model = tiny_model("llama", layers=2, window=8192, seed=seed)
    loaded = LoadedBase(model, byte_level_tokenizer(), f"tiny-{seed}", fingerprint(model))
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base)
    perturb(adapter)
    focus = FocusConfig(window=8192, chunk_size=chunk_size, prompt_length=64)
    return kind(
        loaded, AdapterInfo(loaded.name, loaded.fingerprint, focus, system="Use the documents."), adapter, base=base
    )


@pytest.fixture(scope="session")
def engine() -> Iterator[FocusEngine]:
    """A shared engine; tests must not change it."""
    made = tiny_engine()
    yield made
    made.close()


class EndlessEngine(FocusEngine):
    """An engine whose answers have no end but max_tokens."""

    end_tokens = frozenset()  # type: ignore[assignment]


class ScriptedEngine(FocusEngine):
    """An engine that runs its tiny model on every token, but writes the call or answer that a question means.

    A random model cannot decide what is meant; everything around that decision (rendering, memory, streaming, parsing,
    citations, counts, cancelling) is the real engine's. Answers that have a schema are the real engine's altogether.
    """

    def chat(self, messages, memory=None, **arguments):
        """Answer as the real engine does, with a script's tokens in place of the drawn ones."""
        if arguments.get("schema") is not None:
            return super().chat(messages, memory, **arguments)
        said = script(messages, arguments.get("tools") or (), arguments.get("tool_choice", "auto"))
        stream = super().chat(messages, memory, **{**arguments, "tool_choice": "none"})
        generation: Generation = stream._generation
        left = self.tokenizer.encode(said)

        def draw(sampler, logits):
            return left.pop(0) if left else min(generation.end_tokens), 0.0, ()

        generation._draw = draw  # type: ignore[method-assign]
        return stream


def script(messages: Sequence[Message], tools: Sequence[Tool], choice: str) -> str:
    """Call the named or only tool with the numbers and names in the question; say a result in words."""
    if messages[-1].role == "tool" or not tools or choice == "none":
        return f"Here it is: {messages[-1].content[:40]}"
    question = next(message.content for message in reversed(messages) if message.role == "user")
    named = [tool for tool in tools if choice == tool.name or tool.name.replace("_", " ") in question.lower()]
    tool = (named or list(tools))[0]
    numbers = [int(number) for number in re.findall(r"-?\d+", question)]
    names = re.findall(r"'([^']+)'", question) or re.findall(r"\bin ([A-Z][^?.]+)", question) or [question]
    arguments: dict[str, Any] = {}
    for name, schema in tool.parameters.get("properties", {}).items():
        known: list[Any] = numbers if schema.get("type") in ("integer", "number") else names
        arguments[name] = (known.pop(0) if len(known) > 1 else known[0]) if known else 0
    return write_tool_call(ToolCall("", tool.name, arguments))
