"""Keys, prompts and rewards that change nothing are refused, or named at the start with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import sft_recipe, toy_recipe, write_prompts, write_toml
from toy_runs import invoke, one_line, refuse_tree

import opd
from opd.checks.notices import Finding, notices, notices_of_tuning, without_effect
from opd.config import FileTask
from opd.data.tasks import make_tasks, read_splits, read_tasks


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    tree = toy_recipe(folder, steps=2, evaluation={"num_prompts": 0})
    held_out = [{"id": n, "prompt": f"spell {n}", "answer": str(n)} for n in range(4)]
    tree["tasks"]["second"]["held_out_path"] = str(folder / "others.jsonl")
    (folder / "others.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    return tree


@pytest.fixture
def tree(bench: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return json.loads(json.dumps(bench)) | {"output": str(tmp_path / "run")}


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *tables, leaf = key.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
    tree[leaf] = value


def found(tree: dict[str, Any], **given: Any) -> list[Finding]:
    config = opd.parse_config(tree)
    task_data = read_tasks(config, given.get("reward"), given.get("environment"))
    return notices(config, task_data.prompts, reward=bool(task_data.own_reward), environment=task_data.own_environment)


def no_effect(tree: dict[str, Any], **given: Any) -> list[str]:
    return [f.detail for f in found(tree, **given) if f.name == "no effect"]


def about_rewards(tree: dict[str, Any], **given: Any) -> list[tuple[bool, str]]:
    return [(f.warning, f.detail) for f in found(tree, **given) if f.name == "reward"]


def fair(prompt: object, response: str) -> float:
    return 1.0


def one_turn(prompt: object) -> None:
    return None


def test_a_sound_recipe_has_no_such_key(tree: dict[str, Any]):
    tree["evaluation"] = {"num_prompts": 4}
    assert no_effect(tree) == []


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_that_come_with_opd_have_no_such_key(recipe: Path):
    kind = opd.SftConfig if recipe.stem.startswith("expert") else opd.Config
    assert without_effect(opd.load_config(recipe, kind=kind)) == []


# changes of the toy recipe -> the lines that they give
IDLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an adapter's keys for a whole student": (
        {"trainable": "full"},
        ["lora.rank = 4: trainable = 'full'", "lora.alpha = 8: trainable = 'full'"],
    ),
    "the end of a rate that does not fall": (
        {"optimizer.schedule": "constant", "optimizer.final_lr_fraction": 0.1},
        ["optimizer.final_lr_fraction = 0.1: with optimizer.schedule = 'constant'"],
    ),
    "a reward's keys without one": (
        {"reward.baseline": "grpo", "reward.format_error": -2.0},
        ["reward.baseline = \"grpo\": reward.coef = 0", "reward.format_error = -2.0: reward.coef = 0"],
    ),
    "an objective's keys without distillation": (
        {"objective.coef": 0.0, "objective.type": "to_go", "objective.discount": 0.5, "reward.coef": 1.0},
        ["objective.type = \"to_go\": objective.coef = 0", "objective.discount = 0.5: objective.coef = 0"],
    ),
    "a clip in the first epoch": (
        {"objective.loss": "ppo", "objective.type": "immediate"},
        ["objective.loss = \"ppo\": in the first epoch"],
    ),
    "held-out prompts that are not measured": (
        {"evaluation.held_out_prompts": 5, "detectors.held_out.drop": 0.2, "tasks.second.grader": "math"},
        [
            "evaluation.held_out_prompts = 5: evaluation.every = 0",
            "detectors.held_out.drop = 0.2: evaluation.every = 0",
            "tasks.second.grader = \"math\": it grades held-out rewards, and evaluation.every = 0",
            "tasks.second.held_out_path: evaluation.every = 0 and evaluation.num_prompts = 0",
        ],
    ),
    "an evaluation behind the last step": ({"evaluation.every": 3}, ["evaluation.every = 3: steps = 2"]),
    "a table's prompts without a table": (
        {"evaluation.before_prompts": 5},
        ["evaluation.before_prompts = 5: evaluation.num_prompts = 0", "tasks.second.held_out_path:"],
    ),
    "more prompts before the first step than the table has": (
        {"evaluation.num_prompts": 4, "evaluation.before_prompts": 5},
        ["evaluation.before_prompts = 5: evaluation.num_prompts = 4, and no others are measured"],
    ),
    "what a format error is worth where nothing looks for one": (
        {"reward.coef": 1.0, "reward.format_error": -2.0},
        ["reward.format_error = -2.0: no task has checks"],
    ),
    "keys of a detector that is off": (
        {"detectors.repetition.action": "off", "detectors.repetition.threshold": 0.2},
        ["detectors.repetition.threshold = 0.2: detectors.repetition.action = 'off'"],
    ),
    "a detector of errors that nothing looks for": (
        {"detectors.format_errors.limit": 9.0},
        ["detectors.format_errors.limit = 9.0: no task has checks"],
    ),
    "limits of episodes of one turn": (
        {"episodes.max_turns": 3, "episodes.step_timeout_s": 1.0},
        ["episodes.max_turns = 3: no prompt has an environment", "episodes.step_timeout_s = 1.0: no prompt has"],
    ),
    "more prompts a step than there are": (
        {"sampling.prompts_per_step": 30},
        [
            "sampling.prompts_per_step = 30 takes 15 prompts of tasks.first per step, and it has 12",
            "sampling.prompts_per_step = 30 takes 15 prompts of tasks.second per step, and it has 12",
        ],
    ),
    "a small task with a large weight": (
        {"sampling.prompts_per_step": 14, "tasks.first.weight": 9.0},
        ["sampling.prompts_per_step = 14 takes 13 prompts of tasks.first per step, and it has 12"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDLE)
def test_a_key_that_changes_nothing_is_named_with_the_reason(tree: dict[str, Any], name: str):
    changes, expected = IDLE[name]
    if not any("held_out_path" in line for line in expected):
        put(tree, "evaluation.num_prompts", 4)
    for key, value in changes.items():
        put(tree, key, value)
    lines = no_effect(tree)
    assert len(lines) == len(expected), lines
    for line, start in zip(sorted(lines), sorted(expected), strict=True):
        assert line.startswith(start)


def test_demonstrations_and_verifiers_that_a_run_does_not_use_are_named(tree: dict[str, Any], tmp_path: Path):
    said = [{"role": "assistant", "content": "hello"}]
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps({"id": 1, "prompt": "q", "demonstration": said}) + "\n")
    tree["tasks"]["first"] |= {"path": str(path), "verifier": "number"}
    lines = no_effect(tree)
    assert any(line.startswith("the demonstrations of 1 prompts: 'opd sft'") for line in lines)
    assert "tasks.first.verifier = 'number': no prompt has an answer (the key 'answer' of its record)" in lines


def test_what_a_reward_function_takes_the_place_of_is_named(tree: dict[str, Any]):
    tree["tasks"]["second"] |= {"grader": "exact"}
    tree["evaluation"] |= {"every": 1}
    lines = no_effect(tree, reward=fair)
    assert "tasks.second.grader = 'exact': the reward function takes its place" in lines


# Rewards


def test_a_reward_that_is_only_measured_is_said_with_what_makes_it_train(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    [(warning, detail)] = about_rewards(tree, reward=fair)
    assert warning
    assert detail.startswith("the reward function is only measured: reward.coef = 0")
    assert "set reward.coef above 0" in detail
    opd.train(opd.parse_config(tree), reward=fair)
    assert f"warning: reward: {detail}" in capsys.readouterr().out
    # and what it advises trains
    advised = tree | {"reward": {"coef": 1.0}, "sampling": tree["sampling"] | {"group_size": 2}}
    assert about_rewards(advised, reward=fair) == []


def test_the_rewards_of_verifiers_and_environments_without_a_coefficient_are_said_to_be_measured(tree: dict[str, Any]):
    assert about_rewards(tree) == [
        (False, "the rewards of tasks.first, tasks.second are only measured: reward.coef = 0")
    ]
    assert about_rewards(tree, environment=one_turn) == [
        (False, "the rewards of the environments are only measured: reward.coef = 0")
    ]
    for task in tree["tasks"].values():
        task["verifier"] = "none"
    assert about_rewards(tree) == []


def test_a_task_whose_outcome_nothing_gives_is_named(tree: dict[str, Any], tmp_path: Path):
    tree["reward"] = {"coef": 1.0}
    assert about_rewards(tree) == []
    tree["tasks"]["first"]["verifier"] = "none"
    [(warning, detail)] = about_rewards(tree)
    assert warning
    assert detail.startswith("reward.coef has no effect on 12 of 12 prompts of tasks.first: its verifier is 'none'")
    path = Path(write_prompts(tmp_path / "some.jsonl"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[0]["answer"]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    tree["tasks"]["first"] |= {"verifier": "exact", "path": str(path)}
    [(warning, detail)] = about_rewards(tree)
    assert detail.startswith("reward.coef has no effect on 1 of 12 prompts of tasks.first: they have no answer")


def test_an_outcome_that_nothing_gives_is_refused(tree: dict[str, Any], tmp_path: Path):
    tree["reward"] = {"coef": 1.0}
    for task in tree["tasks"].values():
        task["verifier"] = "none"  # the answers are there, and nobody compares with them
    assert "reward.coef > 0 needs verified rewards" in refuse_tree(tree, tmp_path)


def test_a_reward_that_judges_nothing_is_said_once(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    def forgot(prompt: object, response: str) -> None:
        fair(prompt, response)

    opd.train(opd.parse_config(tree | {"reward": {"coef": 1.0}}), reward=forgot)
    said = [line for line in capsys.readouterr().out.splitlines() if "no verdict" in line]
    assert said == [
        "warning: step 1: the reward was None, no verdict, for all 8 responses; does the function return its number?"
    ]


# What is refused


def test_an_evaluation_on_the_way_that_measures_nothing_is_refused(tree: dict[str, Any], tmp_path: Path):
    tree["evaluation"] = {"num_prompts": 0, "every": 1}
    tree["tasks"]["second"]["verifier"] = "none"
    line = refuse_tree(tree, tmp_path)
    assert "evaluation.every = 1 measures nothing: no task has held-out prompts with an answer and a verifier" in line
    assert read_tasks(opd.parse_config(tree), fair)  # a reward function judges them
    del tree["tasks"]["second"]["held_out_path"]
    line = refuse_tree(tree, tmp_path)
    assert "evaluation.every = 1 measures nothing: no task has held-out prompts; set held_out_path" in line
    with pytest.raises(opd.OpdError, match="measures nothing"):
        read_tasks(opd.parse_config(tree), fair)


@pytest.mark.parametrize("key", ["score_cache", "score_cache_folder"])
def test_scores_of_teachers_are_not_kept_where_there_are_none(bench: dict[str, Any], tmp_path: Path, key: str):
    value = 8 if key == "score_cache" else str(tmp_path / "scores")
    tree = sft_recipe(tmp_path, bench["student"], compute={"threads": 1, key: value})
    line = one_line(invoke("sft", write_toml(tmp_path / "sft.toml", tree)))
    assert f"compute.{key} has no effect in opd sft, because fine-tuning has no teacher; remove the key" in line


def test_a_writer_named_twice_is_refused(tree: dict[str, Any], tmp_path: Path):
    assert "'trackio' stands 2 times; name it once" in refuse_tree(
        tree | {"logging": {"writers": ["trackio"] * 2}}, tmp_path
    )


def test_metrics_of_a_folder_that_is_no_run_are_refused(tree: dict[str, Any], tmp_path: Path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(opd.OpdError, match="is no run folder"):
            opd.read_metrics(place)
    run = opd.train(opd.parse_config(tree)).run
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')  # a kill cut the line
    assert [line["step"] for line in opd.read_metrics(run)] == [1, 2]
    path.write_text("{damaged\n" + whole)
    with pytest.raises(opd.OpdError, match=r"metrics.jsonl', line 1 is damaged"):
        opd.read_metrics(run)
    path.write_text(whole)
    assert "checkpoint.every = 1" in one_line(invoke("eval", run, "evaluation.num_prompts=2", "checkpoint.every=1"))
    assert "logging.samples_every" in one_line(
        invoke("eval", run, "evaluation.num_prompts=2", "logging.samples_every=1")
    )
    assert "compute.score_cache" in one_line(invoke("eval", run, "evaluation.num_prompts=2", "compute.score_cache=1"))


# Fine-tuning


def test_fine_tuning_names_what_has_no_effect(
    bench: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = sft_recipe(tmp_path, bench["student"], steps=2, batch_size=13, evaluation={"num_prompts": 0})
    tree["tasks"]["answers"] |= {"weight": 2.0, "grader": "math"}
    config = opd.parse_config(tree | {"episodes": {"max_turns": 3}}, kind=opd.SftConfig)
    assert isinstance(config.tasks["answers"], FileTask)
    opd.sft(config)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    starts = [
        "warning: no effect: max_new_tokens = 4: evaluation.num_prompts = 0",
        "warning: no effect: tasks.answers.weight = 2: there is no other task",
        "warning: no effect: tasks.answers.grader = \"math\": it grades held-out rewards, and 'opd sft' measures none",
        "warning: no effect: episodes.max_turns = 3: no prompt has an environment or tools",
        "warning: no effect: batch_size = 13 takes 13 prompts of tasks.answers per batch, and it has 12",
    ]
    assert len(said) == len(starts), said
    assert all(line.startswith(start) for line, start in zip(said, starts, strict=True))
    (tmp_path / "plain").mkdir()
    config = opd.parse_config(sft_recipe(tmp_path / "plain", bench["student"]), kind=opd.SftConfig)
    assert notices_of_tuning(config, read_splits(make_tasks(config.tasks))) == []
