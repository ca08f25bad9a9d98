"""Talk to an agent whose chat window is small and whose memory is not.

    python examples/llama_index_agent.py

Turns that leave the window become memory chunks that the model reads in every later turn; the memory is written to a
folder and read again. Printed: what was asked and answered, chunks read, and what the memory holds at the end. The
default model is small and never learned to chat at length: watch the memory, not its wit.
"""

from __future__ import annotations

import asyncio
import tempfile

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import Memory

from focus_integrations.llama_index import FocusLLM, FocusMemoryBlock, memory_tools

SAID = (
    "My name is Anna and my cat is called Biscuit.",
    "I work as a gardener in Lisbon.",
    "Today it rained and I repotted four lemon trees.",
    "What is my cat called?",
)


async def talk(folder: str) -> None:
    """Have a conversation, keep it, and look into it."""
    llm = FocusLLM(max_tokens=32)
    block = FocusMemoryBlock(llm=llm, folder=folder)
    memory = Memory.from_defaults(session_id="anna", token_limit=120, token_flush_size=40, memory_blocks=[block])
    agent = FunctionAgent(tools=memory_tools(block, "anna"), llm=block.reader("anna"))
    for text in SAID:
        response = await agent.run(text, memory=memory)
        print(f"> {text}\n  {response!s}  [{len(block.session('anna').memory)} chunks of memory]", flush=True)
    again = FocusMemoryBlock(llm=llm, folder=folder)  # as another process would find it
    for item in again.recall("What is my cat called?", "anna", top_k=2):
        print(f"  {item.score:.2f} {item.passage!r}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(talk(folder))
