"""From a TOML recipe and `key=value` overrides to a checked configuration, with one clear line for the first fault."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from opd.config.node import nearest
from opd.config.teachers import TeacherConfig
from opd.config.tree import Config, FileTask, PythonTask, ReasoningGymTask, SftConfig, TextArenaTask, ToolTask
from opd.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", Config, SftConfig)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: type[AnyConfig] = Config) -> AnyConfig:
    """Read a TOML recipe, apply `key=value` overrides, and check everything.

    Raises ConfigError with one line that names the file and the key, what was found and what to write instead.
    """
    tree = read_recipe(path)
    apply_overrides(tree, overrides)
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
    """A checked, frozen configuration from plain data; raises ConfigError with one line for the first fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, kind, tree)}") from None


def dump_config(config: Config | SftConfig) -> str:
    """The resolved tree as JSON; `parse_config(json.loads(dump_config(c))) == c`."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key=value` pairs into the tree of a recipe, in place; raises ConfigError for what is no such pair."""
    for override in overrides:
        _apply(tree, override)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override '{override}' is not of the form key=value, such as optimizer.lr=1e-5")
    *tables, leaf = key.strip().split(".")
    node = tree
    for table in tables:
        child = node.setdefault(table, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{table}' is a value in the recipe, not a table")
        node = child
    value = _parse_value(text)
    if leaf in _TEXT_KEYS and not isinstance(value, str):
        value = text  # output=2026-11-21 is a name, not a date
    node[leaf] = value
    if tables[:1] == ["teachers"] and len(tables) >= 2:
        source = [*tables, leaf][2]
        for other in set(_SOURCES) - {source} if source in _SOURCES else ():
            tree["teachers"][tables[1]].pop(other, None)  # a teacher has one source: the override's


_SOURCES = ("model", "adapter", "url", "weights")
_TEXT_KEYS = (
    "student", "output", "model", "adapter", "path", "held_out_path", "teacher", "dataset", "reference", "game",
    "answer_pattern", "answer_end", "served_model", "api_key_env",
)  # fmt: skip


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word: student=Qwen/Qwen3-1.7B needs no quotes


def _explain(error: ValidationError, kind: type[BaseModel], tree: Mapping[str, Any]) -> str:
    """One line for the first fault of a pydantic error."""
    faults = error.errors(include_url=False)
    # An unknown key explains more than what is missing beside it.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    more = f" ({len(faults) - 1} more after this one)" if len(faults) > 1 else ""
    loc = [str(part) for part in fault["loc"]]
    key = ".".join(part for i, part in enumerate(loc) if not _is_union_tag(loc, i))
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(loc[-1], _known_keys(kind, loc[:-1]))}{more}"
    if fault["type"] == "missing":
        return f"key '{key}' is missing; add it to the recipe or pass {key}=...{more}"
    if fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{key}.type must be 'file', 'python', 'reasoning_gym', 'textarena' or 'tools', got {_tag(fault['input'])}{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return (f"{key}: " if key else "") + message + more
    if fault["type"] == "model_type":
        return f"{key} = {fault['input']!r}: expected a table of keys ({', '.join(_known_keys(kind, loc))}){more}"
    hint = ""
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        hint = nearest(fault["input"], re.findall("'([^']*)'", fault.get("ctx", {}).get("expected", "")))
    elif fault["type"] == "list_type":
        hint = f", such as [{json.dumps(fault['input'], default=str)}]"
    return f"{key} = {fault['input']!r}: {message[0].lower()}{message[1:]}{hint}{more}"


def _tag(table: Any) -> str:
    return repr(table["type"]) if isinstance(table, Mapping) and "type" in table else "none"


def _is_union_tag(loc: Sequence[str], index: int) -> bool:
    # pydantic puts the discriminator's value into the location: tasks, <name>, <tag>, <key>
    # and the type that it tried: lora, target_modules, str
    return (index == 2 and loc[0] == "tasks") or loc[:index] == ["lora", "target_modules"]


def _known_keys(kind: type[BaseModel], loc: Sequence[str]) -> list[str]:
    """The keys that the table at `loc` may hold."""
    if not loc:
        return list(kind.model_fields)
    if loc[0] == "tasks" and len(loc) >= 3:
        variants = {
            "file": FileTask,
            "python": PythonTask,
            "reasoning_gym": ReasoningGymTask,
            "textarena": TextArenaTask,
            "tools": ToolTask,
        }
        return _known_keys(variants[loc[2]], loc[3:])
    if loc[0] == "teachers":
        return list(TeacherConfig.model_fields)
    child = kind.model_fields[loc[0]].annotation
    models = [a for a in (child, *get_args(child)) if isinstance(a, type) and issubclass(a, BaseModel)]
    return _known_keys(models[0], loc[1:]) if models else []
