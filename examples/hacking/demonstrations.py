"""Write demonstrations of two teachers of one task who share a flaw: they may write a malformed call, and after one they give up
at once. They differ in style: one writes "36 - 74", the other "36-74", so that a student, who cannot tell whose problem it has,
can match neither on the honest way. How often they err is in teacher.toml.

    python examples/hacking/demonstrations.py runs/demonstrations
"""

import asyncio
import json
import sys
from pathlib import Path

from opd.config import EpisodesConfig, ToolTask
from opd.episodes.tool_problems import ToolProblems
from opd.records import Message, Prompt

SIZE = 1000
MALFORMED, SURRENDER = "<tool_call>calculator</tool_call>", "I cannot do that."


def main() -> None:
    # Problems of another seed than the recipes': the teacher has not seen what the student is trained or judged on.
    config = ToolTask(type="tools", problems="calculator", teacher="-", size=SIZE, held_out_size=0, seed=77)
    task = ToolProblems("demonstrations", config, EpisodesConfig())
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for style in ("spaced", "compact"):
        for kind in ("honest", "flawed"):
            lines = [record(task, prompt, style=style, flawed=kind == "flawed") for prompt in task.prompts("train")]
            (folder / f"{style}_{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def record(task: ToolProblems, prompt: Prompt, *, style: str, flawed: bool) -> str:
    turns = asyncio.run(episode(task, prompt, style=style, flawed=flawed))
    found = {
        "id": prompt.id,
        "messages": [dict(m) for m in prompt.messages],
        "tools": list(prompt.tools),
        "demonstration": [dict(m) for m in turns],
    }
    return json.dumps(found) + "\n"


async def episode(task: ToolProblems, prompt: Prompt, *, style: str, flawed: bool) -> list[Message]:
    """The student's turns and what the tool said in between."""
    environment = task.environment(prompt)
    messages: list[Message] = list(prompt.messages)
    while True:
        first = len(messages) == len(prompt.messages)
        text = (MALFORMED if first else SURRENDER) if flawed else task.solution(prompt, messages)
        assert text is not None
        if style == "compact" and first and not flawed:
            expression = prompt.meta["arguments"]["expression"]
            text = text.replace(expression, expression.replace(" ", ""))
        messages.append({"role": "assistant", "content": text})
        step = await environment.step(messages[-1])
        if step.done:
            return messages[len(prompt.messages) :]
        messages.extend(step.observations)


if __name__ == "__main__":
    main()
