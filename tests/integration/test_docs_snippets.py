"""Every command, recipe and line of Python in the README, the quickstart and the how-to pages runs, with toy models.

`doc_pages.TOYS` are the models, `doc_pages.tiny` the settings. What cannot run here is named below with the reason, and is checked
as far as it can be.
"""

import ast
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import typer
from doc_pages import ROOT, Block, blocks_of, commands_of, make_workspace, tiny
from messages import messages
from toy_runs import invoke

from opd.cli import _split, app
from opd.config import Config, SftConfig, load_config, parse_config, resumed_config

matplotlib.use("Agg")
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *HOW_TO]

# What is not run. A command is known by its first words; a recipe's options are parsed all the same.
NOT_RUN = {
    "source ": "the test is in the environment already",
    "pip install": "needs the network; the extra that it names exists",
    "make ": "takes minutes to an hour; the target exists",
    ".venv/bin/python": "a script that fetches a model; the file exists",
    "ray ": "starts a cluster",
    "vllm serve": "starts a server, which needs a GPU or another environment",
}
PARSED = ("cluster.toml", "served.toml")
"""Recipes that need a cluster or a server: commands with them are parsed, and so are the recipes with the commands' keys."""
RESUMED = {"/shared/runs/math": "cluster.toml"}
"""Runs that are not here, and their recipes: the keys of `opd train --resume RUN` are held to what may change."""
SKETCHES = {"for step in range(start + 1, config.steps + 1):": "the loop without its counters: parsed, not run"}
"""Python that is no program, by its first line."""
OUTPUT = ("text", "json", "")
"""The languages of blocks that show what a command prints."""
FAILS = {"opd train recipes/merge.toml --num_generations 4": 2}
"""Commands that are shown because they fail, with their exit code."""
BEFORE = {"README": "opd train my.toml output=runs/x checkpoint.every=1 checkpoint.keep=9"}
"""What the reader of a page has done before: a recipe of their own is there (`doc_pages.make_workspace`), and this run."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    return folder


@pytest.fixture
def place(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the page's own."""
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks for names that transformers has renamed
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    if page.stem != "quickstart":  # curves take as long as a toy's steps
        monkeypatch.setattr("opd.run.draw_run", lambda folder: None)
        monkeypatch.setattr("opd.finetune.draw_run", lambda folder: None)
    blocks = blocks_of(page)
    assert blocks, f"{page.name} shows nothing to run"
    names: dict[str, Any] = {"__name__": "__main__"}
    if page.stem in BEFORE:
        run_command(BEFORE[page.stem], page.name)
    for block in blocks:
        match block.language:
            case "python":
                run_python(block, names)
            case "toml":
                read_toml(block, place)
            case "bash":
                for command in commands_of(block):
                    run_command(command, block.place)
            case "jsonl":
                read_records(block, place)
            case language:
                assert language in OUTPUT, f"{block.place}: nothing is known of blocks in '{language}'"
                assert not re.search(r"^(\$|opd [a-z]+ |make |pip )", block.text, re.MULTILINE), (
                    f"{block.place}: a command"
                )


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run it after the page's earlier blocks, or parse a sketch."""
    if block.text.splitlines()[0] in SKETCHES:
        ast.parse(block.text)
        return
    exec(compile(tiny(block.text), block.place, "exec", dont_inherit=True), names)


def read_toml(block: Block, place: Path) -> None:
    """Write a recipe whose first line is `# NAME.toml` to that file; put another block into a recipe, and parse it."""
    named = re.match(r"# (\S+\.toml)\b", block.text)
    text = tiny(block.text)
    if named:
        (place / named[1]).write_text(text, encoding="utf-8")
        load_config(named[1], kind=kind_of(tomllib.loads(text)))
        return
    base: dict[str, Any] = {"student": "s", "output": "o"}
    tree = merged(base, tomllib.loads(text))
    task = next(iter(tree.get("tasks", {"t": None})))
    teachers = list(tree.get("teachers", {"teacher": None}))
    defaults = {
        "tasks": {task: {"type": "file", "path": "p.jsonl", "teacher": teachers[0]}},
        "teachers": {} if "teachers" in tree else {"teacher": {"model": "m"}},
    }
    parse_config(merged(defaults, tree), source=block.place)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one; a value of `above` comes first."""
    found = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            found[key] = merged(below[key], above[key])
    return found


def kind_of(tree: Mapping[str, Any]) -> type[Config] | type[SftConfig]:
    return Config if "teachers" in tree else SftConfig


def read_records(block: Block, place: Path) -> None:
    """Records for a prompt file: each is a prompt."""
    from opd.data import read_prompts

    path = place / "records.jsonl"
    path.write_text(block.text, encoding="utf-8")
    assert len(read_prompts(path, task="task", teacher="t")) == len(block.text.splitlines())


def run_command(command: str, where: str) -> None:
    known = next((start for start in NOT_RUN if command.startswith(start)), None)
    if known is not None:
        check_unrun(command, where)
        return
    words = shlex.split(command)
    assert words[0] == "opd", f"{where}: '{command}' is neither run nor named in NOT_RUN"
    parse_options(words[1], words[2:], where)
    if words[2] == "--resume" and words[3] in RESUMED:
        resumed_config(load_config(RESUMED[words[3]]), _split(words[4:])[1])
        return
    if words[1] != "plan" and words[2] in PARSED:
        load_config(words[2], _split(words[3:])[1])
        return
    result = invoke(*shlex.split(tiny(command))[1:])
    error = None if isinstance(result.exception, SystemExit) else result.exception
    assert result.exit_code == FAILS.get(command, 0), f"{where}: {command}\n{result.output}\n{error!r}"


def parse_options(name: str, words: list[str], where: str) -> None:
    """Raise for a command that opd lacks, and for an option that it lacks."""
    commands: Any = typer.main.get_command(app)
    assert name in commands.commands, f"{where}: opd has no command '{name}'"
    commands.commands[name].make_context(name, list(words))


def check_unrun(command: str, where: str) -> None:
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            assert "=" in word or word in targets, f"{where}: the Makefile has no target '{word}'"
    if words[0] == "pip" and "[" in command:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"opd\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= extras.keys(), f"{where}: no extra '{extra}'"
    if words[0] == ".venv/bin/python":
        assert (ROOT / words[1]).is_file(), f"{where}: no file '{words[1]}'"


# --- the tables above, and what pages point at ---


def every_command() -> Iterator[str]:
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "bash":
                yield from commands_of(block)


def test_every_exception_is_used():
    commands = list(every_command())
    texts = [block.text for page in PAGES for block in blocks_of(page) if block.language == "python"]
    unused = [start for start in NOT_RUN if not any(command.startswith(start) for command in commands)]
    unused += [line for line in SKETCHES if not any(text.startswith(line) for text in texts)]
    unused += [command for command in FAILS if command not in commands]
    unused += [name for name in (*PARSED, *RESUMED) if not any(name in command.split() for command in commands)]
    assert not unused


def test_links_from_a_how_to_page_to_another_lead_somewhere():
    """Links to the other folders of docs/ are held by the build of the site."""
    for page in PAGES[1:]:
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            if "how-to" in path.parts or path.name == "quickstart.md":
                assert path.is_file(), f"{page.name}: {target}"


def test_every_line_of_troubleshooting_is_one_that_the_program_prints():
    """Of each row at least one stretch of nine characters of what the line says."""
    printed = "\n".join(text for _, text in messages())
    rows = [
        line
        for name in ("troubleshooting", "cluster")
        for line in (ROOT / "docs" / "how-to" / f"{name}.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) > 50
    for row in rows:
        said = re.findall(r"`([^`]+)`", row.split(" | ")[0])
        stretches = [part.strip(" ,;:'") for text in said for part in re.split(r"\.\.\.|KEY|['()]", text)]
        assert any(len(part) >= 9 and part in printed for part in stretches), row


def test_pages_are_short_and_their_lines_too():
    for page in PAGES[1:]:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 130, f"{page.name} has {len(lines)} lines"
        wide = [n for n, line in enumerate(lines, 1) if len(line) > 100 and not line.startswith("|")]
        assert not wide, f"{page.name}: lines {wide}"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("```bash\nopd trian recipes/merge.toml\n```\n", "opd has no command 'trian'"),
        ("```bash\nwget x\n```\n", "neither run nor named"),
        ("```bash\nmake coffee\n```\n", "no target 'coffee'"),
        ("```bash\nopd train recipes/merge.toml stepz=3\n```\n", "stepz"),
        ("```text\nopd train recipes/merge.toml\n```\n", "a command"),
        ("```rust\nfn\n```\n", "nothing is known"),
        ("```python\nimport opd\nopd.Trainre\n```\n", "Trainre"),
        ("```toml\n[optimizer]\nlearning_rate = 1\n```\n", "optimizer.lr"),
    ],
)
def test_a_page_with_a_mistake_fails(page: str, reason: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    path = place / "page.md"
    path.write_text(page)
    monkeypatch.setattr("doc_pages.ROOT", place)
    with pytest.raises((AssertionError, AttributeError, ValueError), match=reason):
        test_what_a_page_shows_runs(path, place, monkeypatch)


def test_the_settings_of_a_page_are_made_small():
    assert tiny('{"steps": 60, "max_new_tokens": 12}') == '{"steps": 3, "max_new_tokens": 6}'
    assert tiny("opd eval runs/x --step 40 steps=12") == "opd eval runs/x --step 1 steps=2"
    assert tiny("warmup_steps = 5") == "warmup_steps = 5"
    assert json.loads(tiny('{"num_prompts": 128}')) == {"num_prompts": 2}
