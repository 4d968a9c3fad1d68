"""From a TOML recipe and `key=value` overrides to a checked configuration, with one clear line for the first fault."""

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from opd.config.aliases import answer
from opd.config.node import nearest
from opd.config.teachers import TeacherConfig
from opd.config.tree import Config, SftConfig
from opd.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", Config, SftConfig)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: type[AnyConfig] = Config) -> AnyConfig:
    """Read a TOML recipe, apply `key=value` overrides, and check everything.

    Args:
        path: The recipe.
        overrides: Such as `["steps=20", "optimizer.lr=1e-5"]`.
        kind: `Config`, or `SftConfig` for fine-tuning.

    Raises:
        ConfigError: With one line that names file, key, the value found and the value to write.
    """
    tree = read_recipe(path)
    apply_overrides(tree, overrides, kind=kind)
    return parse_config(tree, kind=kind, source=str(path))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The plain tree of a TOML recipe, not yet checked. Raises ConfigError for a file that cannot be read."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe '{path}' does not exist; recipes/ holds the ones that come with opd") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe '{path}' is a folder; name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{path}' is not valid TOML: {error}") from None


def parse_config(tree: Mapping[str, Any], *, kind: type[AnyConfig] = Config, source: str = "config") -> AnyConfig:
    """A checked, frozen configuration from plain data.

    Args:
        tree: The tables of a recipe.
        kind: `Config`, or `SftConfig` for fine-tuning.
        source: A name for error messages.

    Raises:
        ConfigError: With one line for the first fault.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, kind)}") from None


def dump_config(config: Config | SftConfig) -> str:
    """The resolved tree as JSON; `parse_config(json.loads(dump_config(c))) == c`."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], *, kind: type[BaseModel] = Config) -> None:
    """Put `key=value` pairs into the tree of a recipe, in place. In a key of opd, `-` is read as `_`.

    Raises ConfigError for an override that is no such pair.
    """
    for override in overrides:
        _apply(tree, override, kind)


def _apply(tree: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override '{override}' is not of the form key=value, such as optimizer.lr=1e-5")
    table, above, types = tree, "", [kind]
    parts = key.strip().split(".")
    for depth, part in enumerate(parts):
        if not isinstance(table, dict):
            raise ConfigError(f"override '{override}': '{above}' is a value in the recipe, not a table")
        name = part.replace("-", "_") if not types or any(map(_is_table, types)) else part
        if TeacherConfig in types and name in TeacherConfig.sources:
            for other in set(TeacherConfig.sources) - {name}:
                table.pop(other, None)  # a teacher has one source: the override's
        above, types = name, _below(types, name)
        if depth == len(parts) - 1:
            table[name] = _parse_value(text, types)
        else:
            table = table.setdefault(name, {})


def _parse_value(text: str, types: Sequence[Any]) -> Any:
    """The value that TOML reads; the text itself where TOML reads none, or where the key is a text."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word: student=Qwen/Qwen3-1.7B needs no quotes
    # output=2026-11-21 is a name, not a date
    return text if str in types and type(value) not in (str, list, *types) else value


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line for the first fault of a pydantic error."""
    faults = error.errors(include_url=False)
    # An unknown key explains more than what is missing beside it.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    more = f" ({len(faults) - 1} more after this one)" if len(faults) > 1 else ""
    return _line(fault["type"], [str(part) for part in fault["loc"]], fault, kind) + more


def _line(fault: str, loc: list[str], details: Mapping[str, Any], kind: type[BaseModel]) -> str:
    key, types = _place(kind, loc)
    given, message = details["input"], details["msg"].removeprefix("Value error, ")
    match fault:
        case "extra_forbidden":
            named = _is_dict(_below([kind], loc[0]))  # a table whose keys are names: no other library has those
            known = _keys(_place(kind, loc[:-1])[1])
            misspelt = isinstance(given, Mapping) and nearest(loc[-1], known, cutoff=0.75)
            advice = None if named or misspelt else answer(key, given, list(_leaf_keys(kind)))
            return advice or f"unknown key '{key}'{nearest(loc[-1], known)}"
        case "missing":
            return f"key '{key}' is missing; add it to the recipe or pass {key}=..."
        case "union_tag_not_found" | "union_tag_invalid":
            *others, last = sorted(repr(tag) for model in types for tag in _tags(model))
            tag = given.get("type") if isinstance(given, Mapping) else None
            return f"{key}.type must be {', '.join(others)} or {last}, got {'none' if tag is None else repr(tag)}"
        case "value_error":
            return (f"{key}: " if key else "") + message
        case "model_type":
            return f"{key} = {given!r}: expected a table of keys ({', '.join(_keys(types))})"
        case "literal_error" if isinstance(given, str):
            message += nearest(given, re.findall("'([^']*)'", details["ctx"]["expected"]))
        case "list_type":
            message += f", such as [{json.dumps(given, default=str)}]"
    return f"{key} = {given!r}: {message[0].lower()}{message[1:]}"


# The types of a key's values, read from the tables' annotations: alternatives in a list, None left out.


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [found for each in get_args(annotation) for found in _alternatives(each)]
    return [] if annotation is NoneType else [annotation]


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_dict(types: Sequence[Any]) -> bool:
    return any(get_origin(kind) is dict for kind in types)


def _keys(types: Sequence[Any]) -> list[str]:
    return [key for kind in types if _is_table(kind) for key in kind.model_fields]


def _tags(kind: Any) -> tuple[Any, ...]:
    """The values of `type` that choose this table among others."""
    return get_args(kind.model_fields["type"].annotation) if "type" in _keys([kind]) else ()


def _below(types: Sequence[Any], key: str) -> list[Any]:
    """The types of the value at `key` in a table of one of these types."""
    inner = [kind.model_fields[key].annotation for kind in types if _is_table(kind) and key in kind.model_fields]
    inner += [get_args(kind)[1] for kind in types if get_origin(kind) is dict]
    return [found for each in inner for found in _alternatives(each)]


def _place(kind: type[BaseModel], loc: Sequence[str]) -> tuple[str, list[Any]]:
    """The dotted key of a location that pydantic gives, and the types there.

    Where a value has several types, pydantic puts the type that it tried into the location (tasks, NAME, TYPE, KEY).
    """
    parts, types = [], [kind]
    for part in loc:
        if len(types) > 1:
            types = [found for found in types if part in _tags(found)]
        else:
            parts.append(part)
            types = _below(types, part)
    return ".".join(parts), types


def _leaf_keys(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every dotted key of a table; a table whose keys are names is one key."""
    for name in kind.model_fields:
        types = _below([kind], name)
        if len(types) == 1 and _is_table(types[0]):
            yield from _leaf_keys(types[0], f"{above}{name}.")
        else:
            yield above + name


# Models and prompts may lie elsewhere: that they are the same ones is checked by their identities.
MAY_CHANGE = (
    "student",
    *(f"teachers.*.{key}" for key in ("model", "adapter", "url", "server", "served_model", "api_key_env")),
    *(f"teachers.*.{key}" for key in ("engines", "gpus_per_engine", "engine_args")),
    *("tasks.*.path", "tasks.*.held_out_path"),
    *("remote.*", "cluster.*", "compute.*", "checkpoint.*", "logging.*"),
    *("sampling.max_rows", "episodes.max_concurrent"),
)
MAY_NOT_CHANGE = ("cluster.max_staleness", "cluster.mixed_precision", "compute.dtype", "compute.quantization")
IN_EVALUATION = "evaluation.num_prompts"
# an evaluation uses none of these
_TRAINED = ("checkpoint.*", "logging.*", "compute.score_cache", "compute.score_cache_folder")
ON_REQUEST = ("optimizer.*", "evaluation.*", "detectors.*")
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
        if key in known and allow_changes and _is_one_of(key, ON_REQUEST):
            continue
        if key not in known or not _may_change(key, evaluation=evaluation):
            raise ConfigError(f"{key} = {json.dumps(new)}: {_why_not(key, config, evaluation=evaluation)}")
    return changed


def continued_config(run: Config, recipe: Config, began: Mapping[str, Any], *, allow_changes: bool = False) -> Config:
    """The configuration of a run that a recipe continues. Keys that the recipe still has as the run began keep what the run has
    now.

    began: the first value of each key that the run changed since. Raises ConfigError where the recipe has another value of a key
    that may not change.
    """
    tree = json.loads(dump_config(recipe))
    now = dict(_leaves(json.loads(dump_config(run))))
    for key, value in list(_leaves(tree)):
        if key in began and began[key] == value:
            *above, last = key.split(".")
            table = tree
            for name in above:
                table = table[name]
            table[last] = now.get(key)
    continued = parse_config(tree, source="recipe")
    continued = continued.model_copy(update={"template_time": run.template_time, "output": run.output})
    for key, _, new in config_changes(run, continued):
        if not (_may_change(key, evaluation=False) or (allow_changes and _is_one_of(key, ON_REQUEST))):
            raise ConfigError(f"{key} = {json.dumps(new)}: {_why_not(key, run, evaluation=False)}")
    return continued


def config_changes(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value after) of everything that differs; a key that only one of them has is None in the other."""
    old, new = (dict(_leaves(json.loads(dump_config(config)))) for config in (before, after))
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def _is_one_of(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _may_change(key: str, *, evaluation: bool) -> bool:
    if evaluation and (key == IN_EVALUATION or _is_one_of(key, _TRAINED)):
        return key == IN_EVALUATION
    if key == "steps":
        return not evaluation
    return key not in MAY_NOT_CHANGE and _is_one_of(key, MAY_CHANGE)


def _why_not(key: str, config: Config, *, evaluation: bool) -> str:
    if key == "output":
        return "a run is where its folder is; move the folder, and name its new place"
    if evaluation:
        return f"a run is evaluated as it was trained; only {IN_EVALUATION}, and where and how it runs, may change: {_LIST}"
    if _is_one_of(key, ON_REQUEST):
        return (
            "this changes what the run learns from here on; add --allow-changes to `opd train --resume`, or call "
            "Trainer(run).resume(..., allow_changes=True)"
        )
    start = "lora.start" if config.trainable == "lora" else "student"
    return (
        "a run that continues keeps what it learns from; start a new one (once this one is done, "
        f"{start} = 'RUN/student' begins where it is). What may change is where and how it runs: {_LIST}"
    )


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
