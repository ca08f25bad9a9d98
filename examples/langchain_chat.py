"""Chat about documents and show which passages each answer used.

    python examples/langchain_chat.py

Citations are LangChain's standard ones: annotations of the text block, with the exact span in the source.
"""

from __future__ import annotations

from pydoc_data.topics import topics

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from focus_integrations.langchain import ChatFocusLLM

PAGES = ("break", "continue", "pass", "del", "while")
QUESTIONS = ("Which statement terminates the nearest enclosing loop?", "And which one does nothing?")


def main() -> list[BaseMessage]:
    """Ask the questions one after the other and return the conversation."""
    pages = [Document(page_content=topics[name], metadata={"source": name}) for name in PAGES]
    chat = ChatFocusLLM(documents=pages, template="question", citations=2, max_tokens=32)
    talk: list[BaseMessage] = []
    for question in QUESTIONS:
        talk.append(HumanMessage(question))
        answer = chat.invoke(talk)
        talk.append(AIMessage(answer.text))
        print(f"> {question}\n  {answer.text}")
        for block in answer.content_blocks:
            for citation in block.get("annotations", []):
                print(f"    [{citation['title']}] {' '.join(citation['cited_text'].split())[:80]}")
        usage = answer.usage_metadata["input_token_details"]
        print(f"    memory tokens: {usage['cache_creation']} read now, {usage['cache_read']} kept from before")
    return talk


if __name__ == "__main__":
    main()
