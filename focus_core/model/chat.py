"""Say a conversation with tools to any base, and read tool calls back out of what it writes.

Tool calls are written as ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` (Hermes style). A base whose own
template writes them so is given tools through its template; for every other base they are described in the system turn,
and roles that its template refuses are folded into the ones it knows. Text of messages and tools is encoded as plain
text, so nothing in it can forge a turn. The module samples nothing and knows no framework.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from focus_core.errors import ConfigError
from focus_core.model.tool_calls import CALL_CLOSE, CALL_OPEN, ToolCall, write_tool_call
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: who speaks: ``system``, ``user``, ``assistant`` or ``tool`` (a tool's result).
        content: what is said.
        tool_calls: calls that the assistant asks for.
        tool_call_id: call that a ``tool`` message answers.
        name: of the tool that a ``tool`` message comes from, if known.

    Raises:
        ConfigError: the role is unknown or the content is no text.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ConfigError(f"a message's role must be one of {', '.join(get_args(Role))}; got {self.role!r}")
        if not isinstance(self.content, str):
            raise ConfigError(f"a message's content must be text; got {type(self.content).__name__}")


@dataclass(frozen=True)
class Tool:
    """A function the model may ask for.

    Args:
        name: the model writes it in its calls.
        description: what it does and when to use it.
        parameters: JSON schema of its arguments, of type ``object``.

    Raises:
        ConfigError: the name is empty or the parameters are no object schema.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"a tool needs a name; got {self.name!r}")
        if not isinstance(self.parameters, dict) or self.parameters.get("type", "object") != "object":
            raise ConfigError(
                f"the parameters of tool {self.name!r} must be a JSON schema of type 'object'; got {self.parameters!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the tool in the form that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


# -- messages to ids --------------------------------------------------------------------------------------------


def with_system(tokenizer: TextTokenizer, messages: Sequence[Message], system: str | None) -> list[Message]:
    """Put a system turn in front of a conversation that has none, where the base's template knows turns."""
    if system is None or not messages or messages[0].role == "system" or not _has_turns(tokenizer):
        return list(messages)
    return [Message("system", system), *messages]


def render_messages(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    system: str | None = None,
) -> list[int]:
    """Return the token ids of a conversation in the base's chat template, with the opening of the assistant's turn.

    The first form that the template takes without losing a content is used: its own tools and tool turns; tools
    described in the system turn; system turns folded into user turns. Without a template the turns are plain lines.

    Args:
        tokenizer: the base's.
        messages: oldest first, at least one.
        tools: what the model may call.
        system: see :func:`with_system`.

    Raises:
        ConfigError: there is no message.
    """
    if not messages:
        raise ConfigError("a conversation needs at least one message; got none")
    messages = with_system(tokenizer, messages, system)
    described = _described(messages, tools)
    if _has_turns(tokenizer):
        forms: list[tuple[Sequence[Message], Sequence[Tool]]] = [(described, ()), (_alternating(described), ())]
        if described != messages and _writes_calls(tokenizer):
            forms.insert(0, (messages, tools))
        for turns, offered in forms:
            ids = _Rendering(tokenizer).ids(turns, offered)
            if ids is not None:
                return ids
    return tokenizer.encode(_plain_lines(described))


def _has_turns(tokenizer: TextTokenizer) -> bool:
    return bool(getattr(tokenizer.tokenizer, "chat_template", None))


class _Rendering:
    """One try at a template, with marks in place of all text that is not the template's."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        forgeable = sorted({*tokenizer.tokenizer.all_special_tokens, "\ue000", "\ue001"}, key=len, reverse=True)
        self._forgeable = re.compile("|".join(map(re.escape, forgeable)))

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int] | None:
        """Return token ids, or ``None`` where the template refuses the turns or drops one's content."""
        contents = [self._mark(message.content) if message.content else "" for message in messages]
        needed = set(range(len(self.texts)))
        turns = [self._turn(message, content) for message, content in zip(messages, contents, strict=True)]
        offered = [self._guard(tool.to_dict()) for tool in tools] or None
        apply: Any = self.tokenizer.tokenizer.apply_chat_template
        try:
            text = str(apply(turns, tools=offered, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template raises whatever its author chose
            return None
        ids, at = [], 0
        for found in re.finditer("\ue000(\\d+)\ue001", text):
            ids += self.tokenizer.encode_markup(text[at : found.start()])
            ids += self.tokenizer.encode(self.texts[int(found[1])])
            needed.discard(int(found[1]))
            at = found.end()
        return None if needed else ids + self.tokenizer.encode_markup(text[at:])

    def _mark(self, text: str) -> str:
        self.texts.append(text)
        return f"\ue000{len(self.texts) - 1}\ue001"

    def _guard(self, value: Any) -> Any:
        """Put marks in place of special-token strings anywhere in a JSON value."""
        if isinstance(value, str):
            return self._forgeable.sub(lambda found: self._mark(found[0]), value)
        if isinstance(value, dict):
            return {self._guard(key): self._guard(item) for key, item in value.items()}
        return [self._guard(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _turn(self, message: Message, content: str) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
            turn["tool_calls"] = [{"type": "function", "function": self._guard(function)} for function in functions]
        if message.role == "tool":
            turn["name"] = self._guard(message.name or "")
        return turn


def _writes_calls(tokenizer: TextTokenizer) -> bool:
    """Whether the base's template takes tools and writes calls the way that is parsed and enforced here."""
    call = {"type": "function", "function": {"name": "probe", "arguments": {"x": 1}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    apply: Any = tokenizer.tokenizer.apply_chat_template
    try:
        text = str(apply(turns, tools=[Tool("offered").to_dict()], tokenize=False))
    except Exception:
        return False
    written = re.search(re.escape(CALL_OPEN) + r"\s*(\{.*?\})\s*" + re.escape(CALL_CLOSE), text, re.S)
    return "offered" in text and written is not None and '"probe"' in written[1] and '"arguments"' in written[1]


_OFFER = """# Tools

You may call functions. Their signatures, one JSON object a line:
<tools>
{tools}
</tools>

To call a function, write its name and arguments as a JSON object, and nothing after it:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def _described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Write tools, calls and results as text of system, assistant and user turns."""
    found: list[Message] = []
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if found and found[-1].role == "user" and found[-1].content.startswith("<tool_response>"):
                found[-1] = replace(found[-1], content=f"{found[-1].content}\n{result}")
            else:
                found.append(Message("user", result))
        elif message.tool_calls:
            calls = "\n".join(write_tool_call(call) for call in message.tool_calls)
            found.append(Message(message.role, f"{message.content}\n{calls}".lstrip("\n")))
        else:
            found.append(message)
    if tools:
        lines = "\n".join(json.dumps(tool.to_dict(), ensure_ascii=False) for tool in tools)
        offer = _OFFER.format(tools=lines)
        if found[0].role == "system":
            found[0] = replace(found[0], content=f"{found[0].content}\n\n{offer}")
        else:
            found.insert(0, Message("system", offer))
    return found


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Fold system turns into user turns and join neighbours, so that user and assistant alternate, user first."""
    found: list[Message] = []
    for message in messages:
        role: Role = "user" if message.role == "system" else message.role
        if found and found[-1].role == role:
            found[-1] = Message(role, f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(Message(role, message.content))
    if found[0].role == "assistant":
        said = f"You said before: {found[0].content}"
        return _alternating([Message("user", said), *found[1:]])
    return found


def _plain_lines(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return f"{messages[0].content}\n"
    lines = [f"{message.role}: {message.content}" for message in messages]
    return "\n\n".join([*lines, "assistant:"])


# -- conversations longer than the window -----------------------------------------------------------------------


def fit_messages(
    messages: Sequence[Message],
    count: Callable[[Sequence[Message]], int],
    room: int,
    split: Callable[..., tuple[str, str]],
    earlier: int | None = None,
) -> tuple[list[Document], list[Message]]:
    """Split a conversation of any length: what does not fit becomes documents for memory, word for word.

    The head of a long last user turn goes first, then the oldest exchanges, until those that stay before the last user
    turn have at most ``earlier`` tokens, then large tool results, largest first, then the heads of the system turn
    (which holds whole documents in some frameworks) and of the last user turn. The tails of both and everything behind
    the last user turn stay, so a tool call is never parted from its result.

    Args:
        messages: oldest first.
        count: tokens of messages as rendered.
        room: most tokens that may stay.
        split: text, and tokens that a text may have to stay whole -> (head, tail) of it; see
            :meth:`FocusEngine.split_prompt`.
        earlier: see above; as many as there is room for if not given.

    Returns:
        Documents for memory, and the messages that stay.
    """
    kept = list(messages)
    moved: list[Document] = []
    last = max((place for place, message in enumerate(kept) if message.role == "user"), default=len(kept) - 1)
    if kept[last].role == "user":
        head, tail = split(kept[last].content)
        if head.strip():
            moved.append(Document("prompt", head))
            kept[last] = replace(kept[last], content=tail)
    turn, start = 0, int(kept[0].role == "system")
    bound = room if earlier is None else min(room, count([*kept[:start], *kept[last:]]) + earlier)
    # an answer goes with its question
    while last > start and (count(kept) > bound or (turn and kept[start].role != "user")):
        message = kept.pop(start)
        last, turn = last - 1, turn + 1
        text = "\n".join(filter(None, [message.content, *map(write_tool_call, message.tool_calls)]))
        if text.strip():
            moved.append(Document(f"turn-{turn}", f"{message.role}: {text}"))
    results = [place for place, message in enumerate(kept) if message.role == "tool"]
    for place in sorted(results, key=lambda place: -len(kept[place].content)):
        if count(kept) <= room:
            break
        document = Document(f"result-{kept[place].tool_call_id or place}", kept[place].content)
        moved.append(document)
        kept[place] = replace(kept[place], content=f"(kept in memory as {document.id})")
    for place, name in ((0, "system"), (last, "prompt")):
        if kept[place].role in ("system", "user") and count(kept) > room:
            head, tail = split(kept[place].content, 0)
            if head.strip():
                moved.append(Document(name, head))
                kept[place] = replace(kept[place], content=tail)
    return moved, kept
