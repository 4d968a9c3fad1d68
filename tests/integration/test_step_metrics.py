"""Every metric that a run writes is declared with its meaning, and every declared metric is written by some code."""

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import prompt, rollout, scored, toy_recipe
from games import Scripted, say
from templated import save_cross_tokenizer
from toy_runs import reward_of
from zoo import toy_ascii

import opd
from opd.config.detectors import DetectorsConfig
from opd.metrics import values
from opd.records import FailedScore, ScoredRollout
from opd.rewards.reward import TIMEOUTS
from opd.step_metrics import METRICS, PLACEHOLDERS, declared, matches, sampling_metrics

ROOT = Path(__file__).resolve().parents[2]
# Detectors that measure after two steps, in runs that are short.
EAGER = {name: {"memory": 2} for name in DetectorsConfig.model_fields if name != "rearm_steps"}
REWARDED = {"reward": {"coef": 1.0}, "sampling": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4}}
RUNS: dict[str, dict[str, Any]] = {
    "exact": {
        "steps": 6,
        "evaluation": {"num_prompts": 0, "every": 2, "held_out_prompts": 2},
        "compute": {"score_cache": 64},
    },
    "top_k": {"objective": {"type": "top_k", "top_k": 4}, "mask": {"format_errors": "trajectory"}},
    "to_go_ppo": {
        "objective": {"type": "to_go", "discount": 0.5, "loss": "ppo", "epochs": 2, "correction": {"type": "truncate"}},
        **REWARDED,
    },
    "reject": {"objective": {"type": "immediate", "correction": {"type": "reject"}}, **REWARDED},
}


def talk(prompt: opd.Prompt) -> Scripted:
    """An environment of two turns."""
    return Scripted(lambda turn, text: say("go on", reward=0.5, done=turn == 2, events={"heard": 1}))


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    plain = {"steps": 3, "detectors": EAGER, "evaluation": {"num_prompts": 0}, "checkpoint": {"every": 6}}
    tree = toy_recipe(folder, **plain | changes)
    for task in tree["tasks"].values():
        task["checks"] = {"rules": ["truncated", "invalid_utf8"]}
    return tree


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every metric that short toy runs write, and the run that wrote it first."""
    found: dict[str, str] = {}

    def add(kind: str, run: Path) -> None:
        for line in opd.read_metrics(run):
            found.update({name: kind for name in line if name != "step" and name not in found})

    for kind, changes in RUNS.items():
        tree = recipe(tmp_path_factory.mktemp(kind), **changes)
        add(kind, opd.train(opd.parse_config(tree), reward=reward_of).run)
    for kind, objective in (("chunks", {"type": "immediate"}), ("shared vocabulary", {"type": "top_k", "top_k": 4})):
        folder = tmp_path_factory.mktemp("cross")
        tree = recipe(folder, objective=objective)
        tree["student"] = save_cross_tokenizer(folder / "ascii", toy_ascii(), seed=4)
        other = save_cross_tokenizer(folder / "merged", toy_ascii(("a", "b")), seed=5)
        tree["teachers"] = {"even": {"model": other}, "odd": {"model": other}}
        add(kind, opd.train(opd.parse_config(tree)).run)
    tree = recipe(tmp_path_factory.mktemp("talk"), temperature=3.0)
    tree["sampling"]["max_new_tokens"] = 30
    add("environment", opd.train(opd.parse_config(tree), environment=talk).run)
    return dict.fromkeys(values(sampling_metrics(with_servers())), "servers") | found


def with_servers() -> list[ScoredRollout]:
    """Two rollouts: requests for the first were repeated, and a server lost the second."""
    first, second = (rollout([1, 2, 3], 2, prompt=prompt(name)) for name in ("a", "b"))
    lost = ScoredRollout(second, FailedScore("t", "the server is gone", lost=True))
    return [scored(replace(first, events={"retried": 2, TIMEOUTS: 1}), [-1.0]), lost]


def test_every_metric_that_a_toy_run_writes_is_declared(emitted: dict[str, str]):
    assert {name: kind for name, kind in emitted.items() if declared(name) is None} == {}


def test_every_declared_metric_is_written_by_a_toy_run_or_named_in_the_code(emitted: dict[str, str]):
    named = {text for text, is_whole in metric_names() if is_whole}
    idle = [m.name for m in METRICS if not any(matches(m.name, name) for name in emitted) and m.name not in named]
    assert idle == []


def test_every_name_of_a_metric_in_the_code_is_declared():
    for text, _ in metric_names():
        pattern = re.escape(text).replace("\\*", ".+")
        assert declared(text) or any(re.fullmatch(pattern, metric.name) for metric in METRICS), text


def metric_names() -> Iterator[tuple[str, bool]]:
    """The names of metrics in strings of the code, `*` for what a format string fills in, and whether nothing is filled in."""
    for path in sorted((ROOT / "src/opd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            else:
                continue
            if (
                re.fullmatch(r"[a-z_]+(/[a-z_*]+)+/(mean|sum|max)|[a-z_]+/(mean|max)", text)
                and path.stem != "step_metrics"
            ):
                yield text, "*" not in text


def test_lost_rollouts_and_repeated_requests_are_counted_and_absent_where_there_are_none():
    first, lost = with_servers()
    found = values(sampling_metrics([first, lost]))
    assert (found["remote/retried/sum"], found["remote/lost/sum"], found["failed/t/sum"]) == (2.0, 1.0, 1.0)
    assert "episode/retried/sum" not in found
    found = values(sampling_metrics([replace(first, rollout=lost.rollout)]))
    assert not [name for name in found if name.startswith(("remote/", "failed/"))]


def test_a_name_that_is_not_declared_is_not_found():
    assert declared("kl/token/math/mean") == next(m for m in METRICS if m.name == "kl/token/TEACHER/mean")
    for name in ("kl/token/max", "kl/token/a/b/mean", "kl/other/mean", "reward", "xkl/token/mean"):
        assert declared(name) is None


def test_declarations_are_distinct_and_complete():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    used = set(re.findall(r"\b[A-Z]+\b", " ".join(metric.name for metric in METRICS)))
    assert used == set(PLACEHOLDERS)
    for metric in METRICS:
        assert re.search(r"/(mean|sum|max|value)$", metric.name)
        assert metric.meaning.endswith(".")
        assert "|" not in metric.meaning
