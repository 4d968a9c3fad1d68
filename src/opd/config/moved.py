"""What may change when a run goes on: where its parts are and how they run, not what it learns."""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.config.parse import apply_overrides, dump_config, parse_config
from opd.config.tree import Config
from opd.errors import ConfigError

# Models and prompts may lie elsewhere: that they are the same ones is checked by their identities.
_MAY_CHANGE = (
    "student",
    *(f"teachers.*.{key}" for key in ("model", "adapter", "url", "server", "served_model", "api_key_env")),
    *(f"teachers.*.{key}" for key in ("engines", "gpus_per_engine", "engine_args")),
    *("tasks.*.path", "tasks.*.held_out_path"),
    *("served.*", "cluster.*", "compute.*", "checkpoint.*", "logging.*"),
    *("sampling.max_rows", "episodes.max_concurrent"),
)
_MAY_NOT = ("cluster.max_staleness", "cluster.mixed_precision", "compute.dtype")


def moved_config(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of a run that goes on, with `key=value` overrides of where and how it runs.

    `steps` may change as well where the learning rate is constant. Raises ConfigError for what would change what is learnt.
    """
    before = json.loads(dump_config(config))
    tree = json.loads(dump_config(config))
    apply_overrides(tree, overrides)
    moved = parse_config(tree, source="overrides")
    for key, _, new in config_changes(config, moved):
        if not (_may_change(key) and _has(before, key)) and not (key == "steps" and _constant_rate(config)):
            raise ConfigError(
                f"{key} = {json.dumps(new)}: a run that goes on keeps what it learns from; a new one can begin where this one is "
                "(lora.start = 'RUN/student'). What may change is where and how it runs: cluster, served, compute, teachers' "
                "addresses, folders, and steps at a constant rate"
            )
    return moved


def config_changes(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value after) of everything that differs; a key that only one of them has is None in the other."""
    old, new = (dict(_leaves(json.loads(dump_config(config)))) for config in (before, after))
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def _may_change(key: str) -> bool:
    return key not in _MAY_NOT and any(fnmatch.fnmatchcase(key, pattern) for pattern in _MAY_CHANGE)


def _constant_rate(config: Config) -> bool:
    return config.optimizer.schedule == "constant"


def _has(tree: Mapping[str, Any], key: str) -> bool:
    """Whether the run had such a key: a teacher that is new is no other place of one."""
    return key in dict(_leaves(tree))


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
