"""What a line advises works when it is done; commands, options and keys that a line names exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from factories import config_tree, write_toml
from messages import FILLED, messages
from toy_runs import bench as bench
from toy_runs import invoke, one_line
from toy_runs import tree as tree

import opd
from opd.checks.notices import mask_warning
from opd.cli import _split, app
from opd.config import Config, SftConfig, load_config, parse_config
from opd.config.aliases import _TABLE
from opd.config.parse import _leaf_keys, apply_overrides
from opd.config.tasks import FileTask, GeneratedTask, PythonTask, ReasoningGymTask, TextArenaTask, ToolTask
from opd.config.teachers import TeacherConfig

ROOT = Path(__file__).parents[2]
COMMANDS: Any = typer.main.get_command(app)
OF_VLLM = {"--tensor-parallel-size", "--gpu-memory-utilization", "--max-num-batched-tokens", "--max-num-seqs"}
KEYS = {*_leaf_keys(Config), *_leaf_keys(SftConfig)}
TABLES = {key.partition(".")[0] for key in KEYS if "." in key}
OF_NAMES = {
    "teachers": {*TeacherConfig.model_fields},
    "tasks": {
        key
        for task in (FileTask, GeneratedTask, PythonTask, ReasoningGymTask, TextArenaTask, ToolTask)
        for key in task.model_fields
    },
}
FREE = "chat.template_args."  # names of a template's own variables stand below
NAMED = re.compile(rf"(?<![\w./\[])({'|'.join([*TABLES, *OF_NAMES])})\.([\w{FILLED}]+(?:\.[\w{FILLED}]+)*)")


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_new_run_begins_where_a_finished_one_is_as_the_line_says(
    bench: dict[str, Any], tmp_path: Path, trainable: str
):
    tree = bench | {
        "output": str(tmp_path / "run"),
        "trainable": trainable,
        "steps": 2,
        "evaluation": {"num_prompts": 0},
    }
    tree["optimizer"] = {"lr": 1e-3, "warmup_steps": 1}
    run = opd.train(opd.parse_config(tree)).run
    line = one_line(invoke("train", "--resume", run, "seed=7"))
    advised = re.search(r"once this one is done, (\S+) = 'RUN/student' begins where it is", line)
    assert advised
    recipe = write_toml(tmp_path / "recipe.toml", tree | {"output": str(tmp_path / "next")})
    result = invoke("train", recipe, f"{advised[1]}={run}/student")
    assert result.exit_code == 0, result.output
    before, after = (opd.read_metrics(r)[0]["kl/token/mean"] for r in (run, tmp_path / "next"))
    assert before != after


def test_an_evaluation_that_a_line_advises_works(tree: dict[str, Any], tmp_path: Path):
    run = opd.train(opd.parse_config(tree | {"evaluation": {"num_prompts": 0}})).run
    advised = re.search(r"such as (evaluation\.num_prompts=\d+)", one_line(invoke("eval", run)))
    assert advised
    assert invoke("eval", run, advised[1]).exit_code == 0


def test_the_extras_that_lines_advise_to_install_exist():
    text = "".join(p.read_text() for p in Path(opd.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"pip install 'opd\[(\w+)\]'", text))
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.MULTILINE))
    assert named
    assert named <= extras


# --- what any line of the source names ---


def options_of(name: str) -> set[str]:
    return {option for parameter in COMMANDS.commands[name].params for option in parameter.opts}


def wrong_commands(text: str) -> list[str]:
    """Commands of opd in a text that the command line has not, and their options that it has not."""
    wrong = []
    for name, rest in re.findall(r"[`'\"(]opd ([a-z]+)([^`'\")]*)", text):
        if name not in COMMANDS.commands:
            wrong.append(name)
        else:
            wrong += sorted(set(re.findall(r"--[a-z][\w-]*", rest)) - options_of(name) - {"--help"})
    return wrong


def wrong_keys(text: str) -> list[str]:
    """Keys of a recipe in a text that no recipe has; a part that is filled in may be any."""
    wrong = []
    for table, rest in NAMED.findall(text):
        key = f"{table}.{rest}"
        if FILLED in key.replace(f"{table}.{FILLED}.", "") or key.endswith(FILLED):
            continue
        leaf = rest.partition(".")[2]
        if table in OF_NAMES:
            wrong += [key] if leaf and leaf.partition(".")[0] not in OF_NAMES[table] else []
        elif key.startswith(FREE):
            continue
        elif FILLED not in key and not any(known == key or known.startswith(f"{key}.") for known in KEYS):
            wrong.append(key)
    return wrong


def test_every_command_that_a_line_names_exists_with_its_options():
    named = [(place, text) for place, text in messages() if re.search(r"[`'\"(]opd [a-z]", text)]
    assert len(named) >= 8
    assert not [(place, wrong_commands(text)) for place, text in named if wrong_commands(text)]
    assert wrong_commands("use `opd trian` or 'opd train --resmue RUN' (opd check)") == ["trian", "--resmue"]


def test_every_option_that_a_line_names_exists():
    known = {"--help"}.union(*map(options_of, COMMANDS.commands), (o for p in COMMANDS.params for o in p.opts))
    asked = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    # options of servers, and examples of keys, which are options too
    others = ("distributed/", "remote/", "cli.py", "aliases.py", "reference.py")
    found = {
        (place, option)
        for place, text in messages()
        if not any(part in place for part in others)
        for option in asked.findall(text)
    }
    assert len(found) >= 10
    assert not [(place, option) for place, option in found if option not in known | OF_VLLM]


def test_every_key_that_a_line_names_exists():
    other_names = {name for alias in _TABLE for name in alias.names.split()}
    wrong = [(place, key) for place, text in messages() for key in wrong_keys(text) if key not in other_names]
    assert not wrong
    assert wrong_keys("set sampling.groupsize or tasks.\0.verifer, and optimizer.lr") == [
        "sampling.groupsize",
        "tasks.\0.verifer",
    ]


def test_every_page_that_a_line_names_exists():
    named = {(place, page) for place, text in messages() for page in re.findall(r"docs/[\w/-]+\.\w+", text)}
    assert len(named) >= 4
    assert not [(place, page) for place, page in named if not (ROOT / page).is_file()]


def test_the_examples_of_help_are_commands_with_recipes_that_parse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    examples = [
        line
        for command in COMMANDS.commands.values()
        for line in (command.epilog or "").splitlines()
        if line.startswith("opd ")
    ]
    assert len(examples) >= 5
    for example in examples:
        _, name, *words = shlex.split(example)
        COMMANDS.commands[name].make_context(name, list(words))
        if "--resume" not in words:
            recipe, overrides = _split(words)
            assert recipe is not None
            load_config(recipe, overrides, kind=SftConfig if name == "sft" else Config)


# --- lines that are followed ---


def test_a_key_that_may_change_on_request_changes_as_the_line_says(tree: dict[str, Any], tmp_path: Path):
    run = opd.train(parse_config(tree)).run
    again = ("train", "--resume", run, "steps=3", "optimizer.lr=1e-3")
    advised = re.search(r"add (--\S+) to `opd (train --resume)`", one_line(invoke(*again)))
    assert advised
    assert invoke(*again, advised[1]).exit_code == 0
    assert len(opd.read_metrics(run)) == 3


@pytest.mark.parametrize("command", [("eval", "--step", "9"), ("export", "--step", "9", "--output")])
def test_a_checkpoint_that_a_line_names_is_there(tree: dict[str, Any], tmp_path: Path, command: tuple[str, ...]):
    run = opd.train(parse_config(tree | {"evaluation": {"num_prompts": 2}, "checkpoint": {"every": 1}})).run
    name, *options = command
    words = [name, run, *options, *([tmp_path / "out"] if "--output" in options else [])]
    has = re.search(r"it has: ([\d, ]+)", one_line(invoke(*words)))
    assert has
    for step in has[1].strip().split(", "):
        result = invoke(
            *[step if word == "9" else tmp_path / step if word == tmp_path / "out" else word for word in words]
        )
        assert result.exit_code == 0, result.output


def test_a_run_that_exists_is_continued_by_the_command_that_the_line_names(tree: dict[str, Any], tmp_path: Path):
    recipe = write_toml(tmp_path / "recipe.toml", tree)
    assert invoke("train", recipe).exit_code == 0
    advised = re.search(r"continue it with: opd (train --resume \S+);", one_line(invoke("train", recipe)))
    assert advised
    assert invoke(*shlex.split(advised[1]), "steps=3").exit_code == 0
    assert (
        invoke("train", recipe, f"output={tmp_path}/other").exit_code == 0
    )  # "or choose another folder with output=..."


def test_the_python_that_continues_a_run_with_a_reward_of_ones_own_is_what_the_line_says(tree: dict[str, Any]):
    calls = 0

    def reward(prompt: opd.Prompt, response: str) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if calls <= 8 else 1 / 0  # the second step fails

    with pytest.raises(opd.OpdError) as caught:
        opd.train(parse_config(tree), reward=reward)
    advised = re.search(r"continue with: (opd\.Trainer\(.*\)\.resume\(\)), in Python", str(caught.value))
    assert advised
    assert "reward=..." in advised[1]
    result = eval(advised[1].replace("reward=...", "reward=fixed"), {"opd": opd, "fixed": lambda prompt, response: 1.0})
    assert result.finished
    assert [line["step"] for line in result.history] == [1, 2]


def warned(*overrides: str) -> str:
    data = config_tree(sampling={"group_size": 4})
    data["tasks"]["words"]["checks"] = {"rules": ["truncated"]}
    apply_overrides(data, ["mask.format_errors=trajectory", *overrides])
    return mask_warning(parse_config(data)) or ""


def test_a_constant_normalizer_leaves_no_start_from_which_errors_grow_beside_one_from_which_they_fade():
    uncentred = ("objective.type=immediate", "objective.baseline=none", "reward.coef=2")
    line = warned(*uncentred)
    assert "they decrease only if there are few at the start" in line
    advised = re.search(r"set (objective\.normalizer) = '(constant)' with (objective\.constant) = (\d+)", line)
    assert advised
    after = warned(*uncentred, f"{advised[1]}={advised[2]}", f"{advised[3]}={advised[4]}")
    assert after
    assert "few at the start" not in after


@pytest.mark.parametrize(
    "advised", [["reward.coef=1"], ["objective.type=exact"], ["objective.type=immediate", "objective.baseline=kl"]]
)
def test_what_the_warning_of_a_group_mask_advises_ends_it(advised: list[str]):
    grouped = ["objective.type=immediate", "objective.baseline=leave_one_out"]
    line = warned(*grouped)
    for override in advised:
        key, _, value = override.partition("=")
        assert key.rpartition(".")[2] in line
        assert value in line or key == "reward.coef"
    left = grouped if advised[0].startswith("reward") else []
    assert warned(*left, *advised) == ""
