"""What may change when a run goes on, or is evaluated: where its parts are and how they run, not what it learns."""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.config.node import nearest
from opd.config.parse import apply_overrides, dump_config, parse_config
from opd.config.tree import Config
from opd.errors import ConfigError

# Models and prompts may lie elsewhere: that they are the same ones is checked by their identities.
_MAY_CHANGE = (
    "student",
    *(f"teachers.*.{key}" for key in ("model", "adapter", "url", "server", "served_model", "api_key_env")),
    *(f"teachers.*.{key}" for key in ("engines", "gpus_per_engine", "engine_args")),
    *("tasks.*.path", "tasks.*.held_out_path"),
    *("remote.*", "cluster.*", "compute.*", "checkpoint.*", "logging.*"),
    *("sampling.max_rows", "episodes.max_concurrent"),
)
_MAY_NOT = ("cluster.max_staleness", "cluster.mixed_precision", "compute.dtype")
_MEASURED = ("evaluation.num_prompts",)
_TRAINED = (
    "checkpoint.*",
    "logging.*",
    "compute.score_cache",
    "compute.score_cache_folder",
)  # an evaluation uses none of them
_ON_REQUEST = ("optimizer.*", "evaluation.*", "detectors.*")
_LIST = "docs/how-to/resume-and-export.md lists it"


def resumed_config(
    config: Config, overrides: Sequence[str], *, evaluation: bool = False, allow_changes: bool = False
) -> Config:
    """The configuration of a run that continues, with `key=value` overrides of where and how it runs, and of `steps`.

    evaluation: the run is only evaluated, so the number of prompts may change, and steps may not. allow_changes: settings of the
    optimizer, the evaluation and the detectors may change too. Raises ConfigError for any other.
    """
    tree = json.loads(dump_config(config))
    known = dict(_leaves(tree))
    apply_overrides(tree, overrides)
    for name in sorted(set(tree["teachers"]) - set(config.teachers)):
        has = ", ".join(config.teachers)
        raise ConfigError(f"teachers.{name}: this run has no teacher '{name}' ({has}){nearest(name, config.teachers)}")
    changed = parse_config(tree, source="overrides")
    for key, _, new in config_changes(config, changed):
        if key in known and allow_changes and any(fnmatch.fnmatchcase(key, pattern) for pattern in _ON_REQUEST):
            continue
        if key not in known or not _may_change(key, evaluation=evaluation):
            raise ConfigError(f"{key} = {json.dumps(new)}: {_why_not(key, config, evaluation=evaluation)}")
    return changed


def require_resumable(before: Config, now: Config) -> None:
    """Raise ConfigError when a run of the configuration `before` cannot continue with that of `now`."""
    for key, _, new in config_changes(before, now):
        if not _may_change(key, evaluation=False) and key != "template_time":
            raise ConfigError(f"{key} = {json.dumps(new)}: {_why_not(key, before, evaluation=False)}")


def config_changes(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value after) of everything that differs; a key that only one of them has is None in the other."""
    old, new = (dict(_leaves(json.loads(dump_config(config)))) for config in (before, after))
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def _may_change(key: str, *, evaluation: bool) -> bool:
    if evaluation and key in _MEASURED:
        return True
    if evaluation and any(fnmatch.fnmatchcase(key, pattern) for pattern in _TRAINED):
        return False
    if key == "steps":
        return not evaluation
    return key not in _MAY_NOT and any(fnmatch.fnmatchcase(key, pattern) for pattern in _MAY_CHANGE)


def _why_not(key: str, config: Config, *, evaluation: bool) -> str:
    if key == "output":
        return "a run is where its folder is; move the folder, and name its new place"
    if evaluation:
        return (
            f"a run is evaluated as it was trained; only {_MEASURED[0]}, and where and how it runs, may change: {_LIST}"
        )
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in _ON_REQUEST):
        return (
            "this changes what the run learns from here on; add --allow-changes to `opd train --resume`, or call "
            "Trainer(run).resume(..., allow_changes=True)"
        )
    return (
        f"a run that continues keeps what it learns from; start a new one ({_where_it_is(config)}). What "
        f"may change is where and how it runs: {_LIST}"
    )


def _where_it_is(config: Config) -> str:
    key = "lora.start" if config.trainable == "lora" else "student"
    return f"once this one is done, {key} = 'RUN/student' begins where it is"


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
