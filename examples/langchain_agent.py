"""Run an agent whose old turns and tool results go to a memory on disk instead of being summarised away.

    python examples/langchain_agent.py

Needs ``pip install '.[langchain-agents]'``. The default model is small: tool calls are always well formed, but
whether the right one is chosen is up to it. Watch what the memory holds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from focus_integrations.langchain import ChatFocusLLM, LongMemory
from focus_integrations.langchain.middleware import FocusMemoryMiddleware

SAID = (
    "My name is Ada and I am reading about loops.",
    f"Here is a page: {topics['break']}",
    "Which statement ends a loop early?",
)


def main(folder: str | Path) -> LongMemory:
    """Have a conversation, then open its memory again from disk."""
    middleware = FocusMemoryMiddleware(LongMemory(folder), keep_tokens=64, tools=False)
    agent = create_agent(ChatFocusLLM(max_tokens=32), middleware=[middleware], checkpointer=InMemorySaver())
    for text in SAID:
        state = agent.invoke({"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": "ada"}})
        answer = state["messages"][-1]
        print(
            f"> {' '.join(text.split())[:60]}\n  {answer.text}  [{answer.response_metadata['focus']['chunks']} chunks]"
        )
    again = LongMemory(folder)
    for item in again.recall("What is the reader's name?", k=2):
        print(f"  {item.score:.0%} {item.document.id}: {' '.join(item.passage.split())[:60]}")
    return again


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(place)
