"""Coverage-guided fuzzing of the parser of tool calls and of all format checks: any bytes, as a turn of the student.

    make fuzz SECONDS=600

The first byte of an input chooses the syntax, the tools and how the turn ended; of the rest, bytes that no UTF-8 text has
(0xF5 and above, each with the byte behind it) stand for fragments of calls, so that inputs soon look like calls. Every turn
must keep the laws of `check_parsed` and `check_found`, and its flags those of `flagged`; what breaks one is written to a file
named crash-..., with which the program can be called again. An input of the longest length must not take a second.
"""

import importlib
import sys
import time
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
sys.path.insert(0, str(Path(__file__).parents[1] / "turns"))
with atheris.instrument_imports(include=["opd.text.tool_calls", "opd.text.tool_schemas", "opd.rewards.format_checks"]):
    importlib.import_module("opd.text.tool_calls")
    importlib.import_module("opd.rewards.format_checks")

from call_texts import (  # behind the instrumented imports
    ALL,
    FRAGMENTS,
    ID_OF,
    NOTE,
    TOOLS,
    check_found,
    check_parsed,
    flagged,
    flagged_rollout,
    turn_of,
)

TOOL_SETS = (TOOLS, (NOTE,), ())
# beginnings and ends of calls that are nearly right, and the tags of `ALL`
PARTS = (
    *FRAGMENTS, '<tool_call>{"name": "add", "arguments": {"a": ', ', "b": ', "}}</tool_call>", "1", "true", '"x"', '{"": ',
    '<tool_call>{"name": "unique", "arguments": {"items": [', "]}}</tool_call>", '{"op": ', ', "left": ',
    '<tool_call>{"name": "tree", "arguments": ', "<think>", "</think>", "<answer>", "</answer>", "~~~", "\n```\n", "a b " * 20,
)  # fmt: skip
_FIRST_FRAGMENT = 0xF5
_MAX_S = 1.0


def turn_bytes(raw: bytes) -> bytes:
    """An input's turn: fragments in place of the bytes that stand for them."""
    parts: list[bytes] = []
    rest = iter(raw)
    for byte in rest:
        if byte < _FIRST_FRAGMENT:
            parts.append(bytes([byte]))
        else:
            parts.append(PARTS[next(rest, 0) % len(PARTS)].encode(errors="surrogatepass"))
    return b"".join(parts)


def one_input(raw: bytes) -> None:
    if not raw:
        return
    choice, content = raw[0], turn_bytes(raw[1:])
    tools = TOOL_SETS[choice % 3]
    syntax = "hermes" if choice & 0x40 else "json"
    start = time.process_time()
    text = content.decode(errors="surrogateescape" if choice & 0x08 else "replace")
    check_parsed(text, tools, syntax)
    check_found(turn_of(content, last=bool(choice & 0x20), cut=bool(choice & 0x10), syntax=syntax))
    ids = [ID_OF[byte] for byte in content]
    flagged(flagged_rollout([ids[:3], ids], finish="length" if choice & 0x10 else "end", tools=tools), ALL)
    assert time.process_time() - start < _MAX_S, len(content)


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
