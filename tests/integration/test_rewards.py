"""Rewards of the user's own: async ones are awaited, everything that is no reward ends in one line that names prompt and sample."""

import asyncio
import functools
import json
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import prompt, rollout, toy_recipe
from toy_runs import checkpoints, lines_of

import opd
from opd.errors import RewardError
from opd.metrics import values
from opd.rewards import math_values
from opd.rewards import verifiers as verify
from opd.rewards.judge import Judge
from opd.rewards.reward import TimedOut, number_of, rewards_of
from opd.rewards.time_limit import Bounded
from opd.step_metrics import rollout_metrics

ROLLOUTS = [rollout([1, 2, 3], 1, prompt=prompt(f"p{i}"), sample=k) for i in range(2) for k in range(2)]


@pytest.mark.parametrize(
    "value",
    [0.5, np.float32(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([0.5]), Fraction(1, 2)],
    ids=lambda v: type(v).__name__,
)
def test_every_kind_of_number_is_a_reward(value: Any):
    found = number_of(value)
    assert (found, type(found)) == (0.5, float)


@pytest.mark.parametrize("value", [True, 1, np.bool_(True), torch.tensor(True), np.int64(1)])
def test_true_is_worth_one(value: Any):
    assert number_of(value) == 1.0


def test_a_tensor_with_a_gradient_is_a_reward():
    assert number_of(torch.tensor(0.25, requires_grad=True)) == 0.25


def test_none_is_no_verdict():
    assert rewards_of(lambda prompt, response: None, ROLLOUTS) == [None] * 4


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


NO_REWARDS = {
    "text": ("good", r"the reward is 'good' \(str\)"),
    "a number as text": ("0.5", r"the reward is '0.5' \(str\)"),
    "a dict": ({"score": 1.0}, r"the reward is \{'score': 1.0\} \(dict\)"),
    "a list, as TRL has it": ([1.0], r"the reward is \[1.0\] \(list\)"),
    "no number": (float("nan"), "the reward is nan"),
    "no finite number": (float("inf"), "the reward is inf"),
    "a number above 1": (1.5, "the reward is 1.5"),
    "a negative number": (np.float64(-1), r"the reward is np.float64\(-1.0\) \(float64\)"),
    "an array": (np.ones(3), r"the reward is array.* \(ndarray\)"),
    "a tensor": (torch.ones(2), r"the reward is tensor.* \(Tensor\)"),
    "a complex number": (1 + 0j, r"the reward is \(1\+0j\) \(complex\)"),
    "an object that cannot be shown": (Unprintable(), r"the reward is an object that cannot be shown \(Unprintable\)"),
}


@pytest.mark.parametrize("name", NO_REWARDS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_no_number_between_0_and_1_is_named_with_prompt_and_sample(name: str, asynchronous: bool):
    value, message = NO_REWARDS[name]

    def reward(prompt: Any, response: str) -> Any:
        return value if prompt.id == "p1" else 1.0

    async def later(prompt: Any, response: str) -> Any:
        return reward(prompt, response)

    expected = f"^prompt 'p1', sample 0: {message}, expected a number in \\[0, 1\\] or None$"
    with pytest.raises(RewardError, match=expected):
        rewards_of(later if asynchronous else reward, ROLLOUTS)


@pytest.mark.parametrize("error", [ValueError("two\nlines"), SystemExit(3), asyncio.CancelledError(), KeyError("k")])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_reward_raises_is_named_and_kept_as_the_cause(error: BaseException, asynchronous: bool):
    def reward(prompt: Any, response: str) -> Any:
        raise error

    async def later(prompt: Any, response: str) -> Any:
        raise error

    with pytest.raises(RewardError, match=f"^prompt 'p0', sample 0: the reward raised {type(error).__name__}") as found:
        rewards_of(later if asynchronous else reward, ROLLOUTS)
    assert "\n" not in str(found.value)
    assert type(found.value.__cause__) is type(error)


def test_an_interrupt_within_a_reward_stays_an_interrupt():
    def reward(prompt: Any, response: str) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards_of(reward, ROLLOUTS)


async def worth(prompt: Any, response: str, *, by: float = 0.25) -> float:
    await asyncio.sleep(0)
    return by * (1 + int(prompt.id[1]))


class Callable:
    async def __call__(self, prompt: Any, response: str) -> float:
        return await worth(prompt, response)


class Later:
    def __init__(self, value: float) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


ASYNC = {
    "a coroutine function": worth,
    "an object": Callable(),
    "a partial": functools.partial(worth, by=0.25),
    "a function that returns a coroutine": lambda prompt, response: worth(prompt, response),
    "an awaitable of another kind": lambda prompt, response: Later(0.25 * (1 + int(prompt.id[1]))),
}


@pytest.mark.parametrize("name", ASYNC)
def test_an_async_reward_is_awaited(name: str):
    assert rewards_of(ASYNC[name], ROLLOUTS) == [0.25, 0.25, 0.5, 0.5]


def test_an_async_reward_is_awaited_where_an_event_loop_runs_already():
    async def notebook() -> list[float | None]:
        return rewards_of(worth, ROLLOUTS)

    assert asyncio.run(notebook()) == [0.25, 0.25, 0.5, 0.5]


def test_the_rewards_of_a_group_are_awaited_at_the_same_time():
    waiting: list[asyncio.Event] = []

    async def reward(prompt: Any, response: str) -> float:
        if not waiting:
            waiting.append(asyncio.Event())
        reward.seen += 1
        if reward.seen == len(ROLLOUTS):  # nobody goes on before all are here
            waiting[0].set()
        await waiting[0].wait()
        return 1.0

    reward.seen = 0
    assert rewards_of(reward, ROLLOUTS) == [1.0] * 4


def test_a_client_of_one_call_serves_the_next():
    """An HTTP client belongs to the event loop in which it was first used."""
    locks: list[asyncio.Queue[float]] = []

    async def reward(prompt: Any, response: str) -> float:
        if not locks:
            locks.append(asyncio.Queue())
        asyncio.get_running_loop().call_later(0.001, locks[0].put_nowait, 1.0)
        return await locks[0].get()

    assert rewards_of(reward, ROLLOUTS) == rewards_of(reward, ROLLOUTS) == [1.0] * 4


def test_one_that_fails_does_not_wait_for_those_that_hang():
    async def reward(prompt: Any, response: str) -> float:
        if prompt.id == "p1":
            raise ValueError("no")
        await asyncio.sleep(60)
        return 1.0

    start = time.monotonic()
    with pytest.raises(RewardError, match="prompt 'p1', sample 0: the reward raised ValueError: no"):
        rewards_of(reward, ROLLOUTS)
    assert time.monotonic() - start < 50


# In a run


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    changes = {"reward": {"coef": 1.0}, "evaluation": {"num_prompts": 0}, "checkpoint": {"every": 100}}
    return toy_recipe(tmp_path_factory.mktemp("bench"), steps=3, **changes)


def fair(prompt: Any, response: str) -> float:
    return len(response) % 2


@pytest.fixture(scope="module")
def whole(bench: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose reward never failed."""
    tree = bench | {"output": str(tmp_path_factory.mktemp("whole") / "run")}
    return opd.train(opd.parse_config(tree), reward=fair).run


def test_an_async_reward_trains_as_a_plain_one_does(bench: dict[str, Any], whole: Path, tmp_path: Path):
    async def later(prompt: Any, response: str) -> float:
        return fair(prompt, response)

    async def notebook() -> opd.Result:
        return opd.train(opd.parse_config(bench | {"output": str(tmp_path / "run")}), reward=later)

    assert lines_of(asyncio.run(notebook()).run) == lines_of(whole)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", ["raises", "text", "exits"])
def test_a_reward_that_fails_in_a_run_leaves_its_whole_steps_and_a_line_that_works(
    bench: dict[str, Any], whole: Path, tmp_path: Path, fault: str, asynchronous: bool
):
    asked = []

    def failing(prompt: Any, response: str) -> Any:
        asked.append(prompt.id)
        if len(asked) <= 2 * 8:
            return fair(prompt, response)
        if fault == "raises":
            raise ZeroDivisionError("division by zero")
        if fault == "exits":
            raise SystemExit(1)
        return "good"

    async def later(prompt: Any, response: str) -> Any:
        return failing(prompt, response)

    run = tmp_path / "run"
    config = opd.parse_config(bench | {"output": str(run)})
    with pytest.raises(opd.OpdError) as found:
        opd.train(config, reward=later if asynchronous else failing)
    line = str(found.value)
    assert line.startswith("step 3: prompt '")
    assert ", sample " in line
    advice = f"; step 2 is saved: fix it, then continue with: opd.Trainer('{run}', reward=...).resume(), in Python"
    assert line.endswith(advice)
    assert checkpoints(run) == ["step-000002"]
    assert opd.Trainer(run, reward=fair).resume().finished
    assert lines_of(run) == lines_of(whole)


def test_a_reward_that_fails_on_held_out_prompts_leaves_a_step_that_is_finished_later(
    bench: dict[str, Any], tmp_path: Path
):
    tree = bench | {"evaluation": {"num_prompts": 0, "every": 2}}
    calm = opd.train(opd.parse_config(tree | {"output": str(tmp_path / "calm")}), reward=fair).run
    asked = []

    def failing(prompt: Any, response: str) -> float:
        asked.append(prompt.id)
        if len(asked) > 2 * 8 + 1:
            raise RuntimeError("no")
        return fair(prompt, response)

    run = tmp_path / "run"
    with pytest.raises(
        opd.OpdError,
        match=r"after step 2: prompt 'second:\d', sample 0: the reward raised RuntimeError: no; step 2 is saved",
    ):
        opd.train(opd.parse_config(tree | {"output": str(run)}), reward=failing)
    assert opd.Trainer(run, reward=fair).resume().finished
    assert lines_of(run) == lines_of(calm)
    assert len(list((run / "rollouts").iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("reward", 3, "reward is int, expected a function of"),
        ("reward", lambda completions: 1.0, r"reward takes \(completions\), expected \(prompt, response\)"),
        ("environment", lambda: None, r"environment takes \(\), expected \(prompt\)"),
        ("environment", worth, "environment takes"),
    ],
)
def test_a_callable_that_cannot_be_called_is_refused_before_anything_is_loaded(
    bench: dict[str, Any], tmp_path: Path, name: str, function: Any, message: str
):
    config = opd.parse_config(bench | {"output": str(tmp_path / "run"), "student": "/nowhere"})
    with pytest.raises(opd.OpdError, match=message):
        opd.train(config, **{name: function})


def test_a_reward_that_fails_before_the_first_step_says_so_and_the_run_begins_again(
    bench: dict[str, Any], tmp_path: Path
):
    def failing(prompt: Any, response: str) -> float:
        raise RuntimeError("no")

    run = tmp_path / "run"
    config = opd.parse_config(bench | {"output": str(run), "evaluation": {"num_prompts": 2}})
    expected = (
        r"^before the first step: prompt '.*', sample 0: the reward raised RuntimeError: no; no step is saved: fix it"
    )
    with pytest.raises(opd.OpdError, match=expected):
        opd.train(config, reward=failing)
    assert opd.Trainer(run, reward=fair).resume().finished


def test_a_run_in_a_thread_verifies_with_math(bench: dict[str, Any], tmp_path: Path):
    tree = json.loads(json.dumps(bench)) | {"output": str(tmp_path / "run"), "steps": 1}
    for task in tree["tasks"].values():
        task["verifier"] = "math"
    tree["optimizer"] = {"lr": 1e-2, "warmup_steps": 0}
    found: list[opd.Result] = []
    thread = threading.Thread(target=lambda: found.append(opd.train(opd.parse_config(tree))))
    thread.start()
    thread.join()
    assert found[0].finished


# The verifier "math"


def test_math_verifies_in_any_thread():
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(verify.mathematical("$\\frac{1}{2}$", "0.5")))
    thread.start()
    thread.join()
    assert found == [verify.mathematical("$\\frac{1}{2}$", "0.5")] == [1.0]


def test_an_expression_that_python_computes_for_ever_is_worth_0_in_bounded_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "MATH_LIMIT_S", 1.0)
    start = time.monotonic()
    worth = verify.mathematical("$9^{9^{9^{9}}}$", "3")
    assert worth == 0.0
    assert isinstance(worth, TimedOut)
    assert time.monotonic() - start < 60  # a busy machine starts the process anew
    monkeypatch.undo()
    assert verify.mathematical("$3$", "3") == 1.0


def test_responses_that_run_out_of_the_verifiers_time_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "MATH_LIMIT_S", 1.0)
    judge = Judge(lambda prompt, response: verify.mathematical("$9^{9^{9^{9}}}$" if prompt.id == "p0" else "3", "3"))
    judged = judge([replace(r, reward=None) for r in ROLLOUTS[1:]])
    assert [r.reward for r in judged] == [0.0, 1.0, 1.0]
    assert [dict(r.events) for r in judged] == [{"verifier_timeouts": 1}, {}, {}]
    assert values(rollout_metrics(judged))["verifier/timeouts/sum"] == 1.0
    assert "verifier/timeouts/sum" not in values(rollout_metrics(judged[1:]))


def test_one_step_of_a_comparison_that_takes_too_long_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_values, "_equal", lambda *given: time.sleep(30))
    monkeypatch.setattr(math_values, "_SECONDS", 1)
    assert verify.compared("3", "4") is None


def test_a_run_shows_how_many_responses_were_not_compared_in_time(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 2, "every": 1, "held_out_prompts": 2})
    result = opd.train(opd.parse_config(tree), reward=lambda prompt, response: TimedOut())
    line = opd.read_metrics(result.run)[-1]
    assert line["verifier/timeouts/sum"] == line["batch/rollouts/sum"]
    assert line["held_out/timeouts/sum"] > 0
    assert (
        "responses count as wrong: the verifier did not compare them in time" in (result.run / "parity.md").read_text()
    )


def test_an_environments_reward_that_was_not_known_in_time_is_counted():
    [judged] = Judge(lambda prompt, response: 1.0)([replace(ROLLOUTS[0], reward=number_of(TimedOut()))])
    assert judged.events["verifier_timeouts"] == 1


def test_a_call_that_fails_or_ends_its_process_does_not_spoil_the_next():
    with_limits = Bounded()
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        with_limits.call(json.loads, "{", limit_s=60)
    with pytest.raises(TimeoutError):
        with_limits.call(time.sleep_forever if hasattr(time, "sleep_forever") else input, "", limit_s=0.2)
    assert with_limits.call(json.loads, "[1]", limit_s=60) == [1]
    with_limits.close()
