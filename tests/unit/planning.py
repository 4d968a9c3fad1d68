"""Recipes to plan, and the folders of their models: a config.json each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

import opd_plan.work
from opd.config import Config, parse_config
from opd_plan.devices import DEVICES, Assumptions
from opd_plan.search import best_plan
from opd_plan.work import work_of

H100 = Assumptions(DEVICES["h100"])
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """A model's sizes are read once a file of tests, as long as its config.json stays the same."""

    def once(function: Any) -> Any:
        known: dict[Any, Any] = {}

        def call(source: str, **options: Any) -> Any:
            file = Path(source) / "config.json"
            key = source, repr(options), file.read_bytes() if file.exists() else None
            if key not in known:
                known[key] = function(source, **options)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("read_shape", "adapter_parameters"):
            patch.setattr(opd_plan.work, name, once(getattr(opd_plan.work, name)))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with a config.json alone: a small student, two teachers of a billion parameters, one that no node holds."""
    base = tmp_path_factory.mktemp("shapes")
    wide = {**SMALL, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    wide |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    vast = {**wide, "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 120}
    every = {"student": SMALL, "one": wide, "two": wide, "vast": vast}
    for name, dims in every.items():
        Qwen3Config(**dims).save_pretrained(base / name)
    return {name: str(base / name) for name in every}


def planned_recipe(folders: dict[str, str], teachers: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A distributed recipe whose teachers are two models at engines; tables that are given are merged into its own."""
    engines = {"engines": 1, "gpus_per_engine": 1, "engine_args": ["--max-num-batched-tokens", "1024"]}
    teachers = teachers or {name: {"model": folders[name], **engines} for name in ("one", "two")}
    tree: dict[str, Any] = {
        "student": folders["student"],
        "output": "runs/none",
        "backend": "ray",
        "cluster": {},
        "teachers": teachers,
        "tasks": {n: {"type": "file", "path": "x.jsonl", "teacher": n} for n in teachers},
        "sampling": {"prompts_per_step": 16, "group_size": 4, "max_new_tokens": 256},
        "objective": {"type": "top_k", "top_k": 8},
        "lora": {"rank": 8, "alpha": 8},
        "compute": {"dtype": "bfloat16", "max_tokens": 4096},
        "remote": {"max_in_flight": 64},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return parse_config(tree)


def plan(config: Config, gpus: int, assumed: Assumptions = H100):
    return best_plan(config, work_of(config, prompt_tokens=assumed.prompt_tokens), gpus, assumed)
