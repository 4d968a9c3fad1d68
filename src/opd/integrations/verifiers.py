"""Episodes of verifiers 0.4: the student takes the place of the one agent of an environment.

An environment of verifiers asks its agent for turns. Here it runs in an asyncio task and waits for the student's turns.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]  # no dependency of opd: its users have it
from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports]

from opd.records import Message
from opd.roles import Step


def messages_of(task: Any) -> list[Message]:
    """The messages of a task before the first turn: those of its prompt in a recipe. Empty where the user begins."""
    system = [vf.SystemMessage(content=task.data.system_prompt)] if task.data.system_prompt else []
    return _plain(system) + _plain(task.data.prompt)


class VerifiersEpisode:
    """One episode, to be given to `opd.train(config, environment=...)`.

    task: of a taskset; its prompt in the recipe is `messages_of(task)`. environment: for tasks of several turns, a result of
    `verifiers.v1.load_environment` for this episode; None: one turn on the prompt. The reward is verifiers' weighted sum;
    the episode fails outside [0, 1]. The limits are the recipe's, not those of the agent's configuration.
    Raises ValueError for a task that needs tools, a container, or hooks that stop or change turns.
    """

    def __init__(self, task: Any, environment: Any = None) -> None:
        _require_talk_alone(task, environment)
        self._task = task
        self._environment = environment

    async def reset(self) -> Sequence[Message]:
        self._student = _Student()
        self._run = asyncio.create_task(self._play())
        opening = await self._next()
        if opening.done:
            raise ValueError("the environment was done before the first turn")
        return opening.observations

    async def step(self, message: Message) -> Step:
        self._student.replies.put_nowait(message["content"])
        return await self._next()

    async def _next(self) -> Step:
        said = asyncio.create_task(self._student.said.get())
        await asyncio.wait({said, self._run}, return_when=asyncio.FIRST_COMPLETED)
        if said.done():
            return Step(said.result())
        said.cancel()
        self._run.result()  # raises what the environment raised
        trace = self._student.trace
        return Step(reward=trace.reward if trace is not None and trace.rewards else None, done=True)

    async def _play(self) -> None:
        """As `verifiers.v1.Env.run_episode`."""
        environment, student = self._environment, self._student
        if environment is None:
            await student.run(self._task)
            return
        agents = vf.Agents(environment.config, lambda name, config: student)
        await environment.setup(agents)
        await environment.run(self._task, agents)
        await environment.finalize(self._task, vf.Episode(task=student.trace.task, traces=[student.trace], ok=True))


class _Student:
    """The parts of `verifiers.v1.Agent` and `Interaction` that environments use."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[list[Message]] = asyncio.Queue()
        self.replies: asyncio.Queue[str] = asyncio.Queue()
        self.trace: Any = None

    async def run(self, task: Any) -> Any:
        async with self.interaction(task):
            await self.turn()
        return self.trace

    @asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator["_Student"]:
        if self.trace is not None:
            raise ValueError("the environment asks for several agents or attempts in an episode, expected one")
        _require_talk_alone(task)
        kept, agent = vf.TraceTask(type=type(task).__name__, data=task.data), vf.AgentInfo(config=vf.AgentConfig())
        self.trace = vf.Trace(task=kept, agent=agent, state=state_cls(type(task))())
        self._record(messages_of(task))
        yield self
        await task.score(self.trace)
        self.trace.ok = self.trace.is_completed = True

    async def turn(self, message: Any = None) -> vf.Segment:
        """The student's answer to a turn of the user; message: None where the prompt of the task is the first turn."""
        self._record(asked := _plain(message))
        self.said.put_nowait(asked)
        self._record([{"role": "assistant", "content": await self.replies.get()}], sampled=True)
        return vf.Segment(messages=[self.trace.last_message])

    def _record(self, messages: Sequence[Message], *, sampled: bool = False) -> None:
        nodes = self.trace.nodes
        for message in messages:
            nodes.append(vf.MessageNode(parent=len(nodes) - 1 if nodes else None, message=message, sampled=sampled))


def _plain(said: Any) -> list[Message]:
    said = [{"role": "user", "content": said}] if isinstance(said, str) else said or []
    found: list[Message] = [m if isinstance(m, dict) else m.model_dump(exclude_none=True) for m in said]
    if any(set(m) != {"role", "content"} or not isinstance(m["content"], str) for m in found):
        raise ValueError(
            "the environment sent more than text, such as images or tool calls; opd supports text messages only"
        )
    return found


def _require_talk_alone(task: Any, environment: Any = None) -> None:
    """Raise ValueError for a task that needs parts of the agent that opd does not have."""
    kind, taskset = type(task), getattr(environment, "taskset", None)
    scorers = [*task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    runtimes = [inspect.signature(scorer).parameters.get("runtime") for scorer in scorers]
    needs = {
        "a container": task.NEEDS_CONTAINER or task.data.image,
        "tools": task.toolsets(task.config) or (taskset is not None and taskset.toolsets(taskset.config)),
        "hooks on turns": task.hooks("stop") or any(hasattr(getattr(kind, name), "intercept") for name in dir(kind)),
        "a runtime that is set up": kind.setup is not vf.Task.setup or kind.finalize is not vf.Task.finalize,
        "a runtime to score in": any(p is not None and p.default is p.empty for p in runtimes),
    }
    if lacking := [need for need, there in needs.items() if there]:
        raise ValueError(f"task {task.data.idx} of verifiers needs {' and '.join(lacking)}, which opd does not have")
