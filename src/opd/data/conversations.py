"""Messages of a record, in any of the supported forms, and the checks that make them a prompt."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from opd.data.rows import plain_data, strict_json
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.text.call_template import tool_call

_ROLES = ("system", "user", "assistant", "tool")
_BESIDE: Mapping[str, tuple[str, ...]] = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
_SHAREGPT: Mapping[str, str] = {"from": "role", "value": "content"}  # its keys, and below its names of roles
_SENDERS: Mapping[str, str] = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def read_messages(messages: Any, key: str) -> tuple[Message, ...]:
    """Messages of {"role", "content"}, or of {"from", "value"} as in ShareGPT.

    A message of the assistant may have "tool_calls" beside or instead of content; their arguments are an object or its JSON text.
    A message of a tool gets the id and the name of its call. All ids of calls are new, because templates require ids of their own
    form. key: the name of the messages in an error. Raises DataError.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'{key}' must be a non-empty list, got {messages!r:.80}")
    found: list[Message] = []
    waiting: list[tuple[Any, Mapping[str, Any]]] = []  # the id of a call in the record, and the call
    number = 0
    for place, message in enumerate(messages):
        read = _message(message, f"{key}[{place}]")
        if read["role"] == "assistant":
            given = read.pop("tool_calls", ())
            calls = [_call(call, number + k, f"{key}[{place}]") for k, call in enumerate(given)]
            waiting = [(call.get("id"), read_call) for call, read_call in zip(given, calls, strict=True)]
            number += len(waiting)
            read |= {"tool_calls": tuple(calls)} if calls else {}
        elif read["role"] == "tool" and waiting:
            answered = next((pair for pair in waiting if pair[0] == read.get("tool_call_id")), waiting[0])
            waiting.remove(answered)
            read |= {"tool_call_id": answered[1]["id"], "name": answered[1]["function"]["name"]}
        found.append(MappingProxyType(read))
    return tuple(found)


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{name} needs 'role' (one of {', '.join(_ROLES)}), a string 'content', got {message!r:.80}")
    given: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if "from" in given or "value" in given:
        given = {_SHAREGPT.get(str(key), str(key)): value for key, value in given.items()}
        sender = given.get("role")
        given["role"] = _SENDERS.get(sender, sender) if isinstance(sender, str) else None
    calls = given.get("tool_calls")
    if calls in ([], ""):
        del given["tool_calls"]
    if given.get("role") == "assistant" and calls:
        given.setdefault("content", "")
    if given.get("role") not in _ROLES or not isinstance(given.get("content"), str):
        raise DataError(
            f"{name} needs 'role' (one of {', '.join(_ROLES)}), a string 'content', got role {given.get('role')!r:.40} and "
            f"content {given.get('content')!r:.40}"
        )
    allowed = _BESIDE.get(str(given["role"]), ())
    for key in given:
        if key not in ("role", "content", *allowed):
            raise DataError(
                f"{name} has the key '{key}', which no model is shown; remove it, or write it into 'content'"
            )
    for key in ("tool_call_id", "name"):
        if not isinstance(given.get(key, ""), str):
            raise DataError(f"{name}: '{key}' must be a string, got {given[key]!r:.40}")
    if "tool_calls" in given and not isinstance(given["tool_calls"], list):
        raise DataError(f"{name}: 'tool_calls' must be a list, got {type(calls).__name__}")
    return given


def _call(call: Any, number: int, name: str) -> dict[str, Any]:
    """A call in the form of chat templates: its arguments are an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{name}: a call needs 'function' with 'name' and 'arguments', got {call!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = strict_json(arguments)
        except DataError as error:
            raise DataError(f"{name}: arguments of the call of '{function['name']}': {error}") from None
        plain_data(arguments, f"{name}: an argument of the call of '{function['name']}'")
    arguments = {} if arguments in (None, "") or (isinstance(arguments, str) and not arguments.strip()) else arguments
    if not isinstance(arguments, dict):
        raise DataError(
            f"{name}: arguments of the call of '{function['name']}' must be an object or its JSON text, got {arguments!r:.40}"
        )
    return tool_call(number, function["name"], arguments)


def order_fault(messages: Sequence[Message]) -> str:
    """Why the student cannot answer a conversation with this order of roles; "" where it can."""
    roles = [m["role"] for m in messages]
    if not roles:
        return "there are no messages"
    for place, role in enumerate(roles):
        before = roles[place - 1] if place else None
        if role not in _ROLES:
            return f"message {place + 1} has the role {role!r:.40}, expected one of {', '.join(_ROLES)}"
        if role == "system" and place:
            return f"message {place + 1} is a system message, which is allowed once, at the beginning; join them there"
        if role == "tool" and before not in ("assistant", "tool"):
            return f"message {place + 1} has the role 'tool', and no call of the assistant comes before it"
        if role == "assistant" and before == "assistant":
            return f"messages {place} and {place + 1} are both the assistant's; join them"
    if not {"user", "tool"} & set(roles):
        who = "system" if roles == ["system"] else roles[-1]
        return f"there is no user message to answer, only a message of the {who}; add a message of role 'user'"
    return ""


def prompt_fault(messages: Sequence[Message]) -> str:
    """Why a conversation is no prompt for the student; "" where it is one."""
    if fault := order_fault(messages):
        return fault
    if not any(message["content"].strip() for message in messages):
        return "every message is empty; write what the student is asked"
    for place, message in enumerate(messages):
        if message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            return f"message {place + 1}, the {message['role']}'s, is empty; write its text, or remove it"
    if messages[-1]["role"] == "assistant":
        return "the last message is the assistant's answer, and the student would continue after it; cut it off"
    return ""


def demonstration_fault(demonstration: Sequence[Message]) -> str:
    """Why messages are no demonstration, which begins and ends with a turn of the student; "" where they are one."""
    if demonstration[0]["role"] != "assistant" or demonstration[-1]["role"] != "assistant":
        return "must begin and end with a message of role 'assistant'"
    question: Message = {"role": "user", "content": "?"}
    if fault := order_fault((question, *demonstration)):
        return f"has its roles in a wrong order (messages counted from the prompt's last one): {fault}"
    for message in demonstration:
        if message.get("tool_calls"):
            return "has a call as data; write it into the content, in the syntax of episodes.tool_syntax"
        if message["role"] == "assistant" and not message["content"].strip():
            return "has an empty turn of the assistant; write its text"
    return ""


def check_prompt(prompt: Prompt, where: str) -> None:
    """Raise DataError, which begins with `where`, for a prompt that no student can be given, from a file or from Python."""
    try:
        _require_plain(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    fault = prompt_fault(prompt.messages)
    if not fault and prompt.demonstration and (what := demonstration_fault(prompt.demonstration)):
        fault = f"'demonstration' {what}"
    if fault:
        raise DataError(f"{where}: {fault}")


def _require_plain(prompt: Prompt) -> None:
    """Raise DataError for invalid text, an id that cannot be printed, or a message without role and content."""
    for field in ("id", "task", "teacher", "answer"):
        plain_data(getattr(prompt, field), f"the {field}", strict=False)
    for field in ("messages", "demonstration", "meta", "tools"):
        plain_data(getattr(prompt, field), field, strict=False)
    if not all(c.isprintable() for c in prompt.id):
        raise DataError(f"the id {prompt.id!a} has characters that cannot be printed")
    for message in (*prompt.messages, *prompt.demonstration):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"a message has no string 'role' and 'content': {dict(message)!r:.80}")
