"""Code that comes with a model is never run, and nobody is asked whether to run it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import save_toy, sft_recipe, write_toml
from toy_runs import bench as bench
from toy_runs import invoke, place_of, refuse_tree
from toy_runs import tree as tree

ROOT = Path(__file__).parents[2]
_CODE = (
    "from pathlib import Path\n"
    "Path({ran!r}).write_text('run')\n"
    "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
)
_NEVER = "needs code of its own (auto_map in config.json or tokenizer_config.json), which opd never runs"
_CONFIG, _MODEL = {"AutoConfig": "own.C"}, {"AutoModelForCausalLM": "own.M"}


def save_own(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> str:
    """A toy whose folder holds code that leaves a file behind when it is run."""
    save_toy(folder, 1)
    (folder / "own.py").write_text(_CODE.format(ran=str(folder / "RAN")))
    for name, fields in (("config.json", config), ("tokenizer_config.json", tokenizer or {})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    return str(folder)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "config and model": ({"model_type": "mine", "auto_map": _CONFIG | _MODEL}, None),
    "model alone": ({"model_type": "mine", "auto_map": _MODEL}, None),
    "of another repository": ({"model_type": "mine", "auto_map": {"AutoConfig": "a/b--own.C"}}, None),
    "tokenizer": ({}, {"auto_map": {"AutoTokenizer": [None, "own.T"]}, "tokenizer_class": "Mine"}),
}


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_needs_its_own_code_is_refused_in_one_line(
    tree: dict[str, Any], tmp_path: Path, who: str, kind: str
):
    folder = save_own(tmp_path / "own", *KINDS[kind])
    place_of(tree, who, folder)
    assert f"model '{folder}' {_NEVER}" in refuse_tree(tree, tmp_path)
    assert not (tmp_path / "own" / "RAN").exists()


@pytest.mark.parametrize("command", ["train", "check", "sft", "align", "plan"])
def test_a_process_with_yes_on_its_standard_input_runs_none_of_it(tree: dict[str, Any], tmp_path: Path, command: str):
    folder = save_own(tmp_path / "own", *KINDS["config and model"])
    recipe = write_toml(tmp_path / "recipe.toml", tree | {"student": folder})
    tokens = save_own(tmp_path / "tokens", *KINDS["tokenizer"])
    arguments = {
        "train": ["train", recipe],
        "check": ["check", recipe],
        "sft": ["sft", write_toml(tmp_path / "sft.toml", sft_recipe(tmp_path / "sft", folder))],
        "align": ["align", "--student", tokens, "--teacher", tree["student"]],
        "plan": ["plan", recipe, "backend=ray"],
    }[command]
    finished = subprocess.run(
        [sys.executable, "-c", "from opd.cli import main; main()", *arguments],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 2
    [line] = finished.stderr.splitlines()
    assert _NEVER in line
    assert "[y/N]" not in finished.stdout
    assert not (tmp_path / "own" / "RAN").exists()
    assert not (tmp_path / "tokens" / "RAN").exists()


@pytest.mark.parametrize(
    ("config", "tokenizer", "said"),
    [
        ({"auto_map": _CONFIG | _MODEL}, None, "its config.json names code of its own (own.M), which opd never runs"),
        ({}, {"auto_map": {"AutoTokenizer": [None, "own.T"]}}, "its tokenizer_config.json names code of its own"),
    ],
)  # fmt: skip
def test_where_transformers_has_a_class_it_takes_the_place_of_the_code_and_check_says_so(
    tree: dict[str, Any], tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None, said: str
):
    folder = save_own(tmp_path / "own", config, tokenizer)
    place_of(tree, "teacher", folder)
    shown = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    assert shown.exit_code == 0, shown.output
    assert f"warn  models are loaded as their files say: model '{folder}': {said}" in shown.stdout
    assert not (tmp_path / "own" / "RAN").exists()


def test_no_loader_is_called_without_refusing_the_models_own_code():
    """Everything that reads a model, a tokenizer or a config by name says trust_remote_code=False."""
    found, bare = 0, []
    for folder in ("src", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                name = node.func.attr
                if name == "from_config" or name == "from_pretrained":
                    found += 1
                    said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                    if said.get("trust_remote_code", True) is not False:
                        bare.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bare == []
    assert found > 10
