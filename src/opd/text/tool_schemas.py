"""The arguments that tools take: their JSON schemas, and whether a call's arguments are within them.

Arguments are a model's and may be anything that strict JSON of bounded size and depth can be: a check of them ends after a
number of steps, fetches nothing and does not raise. A tool's own schema is its author's, and is checked once.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, TypeAlias

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from opd.errors import DataError

MAX_STEPS = (
    50_000  # keywords checked in one turn: with a schema that refers to itself, a call can ask for 2^depth of them
)
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "additionalProperties": False}


class Toolbox:
    """The tools of one turn by name, with the steps that checking its calls may still take."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises DataError naming the first tool that has no name, one that is taken, or parameters that are no JSON schema."""
        try:
            described = json.dumps(list(tools), default=dict)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"tools: expected JSON objects: {error}") from None
        self._validators = _validators(described)
        self.names = tuple(self._validators)
        self._steps = MAX_STEPS

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._validators

    def fault(self, name: str, arguments: Mapping[str, Any], *, key: str) -> str:
        """The first place at which the arguments violate their schema, and the demand of the schema there; "" where they fit.

        key: what the arguments are called in the path. The text may be as long as the arguments.
        """
        _turn.set(self)
        try:
            error = next(iter(self._validators[name].iter_errors(arguments)), None)
        except _TooManySteps:
            return f"{key}: too much to check against the schema"
        except (RecursionError, Unresolvable):
            return f"{key}: cannot be checked against the schema"
        if error is None:
            return ""
        path = key + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:40]}" for part in error.absolute_path)
        match error.validator:
            case None:
                return f"{path}: a value that the schema forbids"
            case "type":
                allowed: Any = error.validator_value
                expected = " or ".join([allowed] if isinstance(allowed, str) else allowed)
                return f"{path}: expected {expected}, got {kind(error.instance)}"
            case "required" | "dependentRequired" | "additionalProperties" | "unevaluatedProperties":
                return f"{path}: {error.message}"
            case _:
                return f"{path}: expected {error.validator} {json.dumps(error.validator_value)}"

    def count_step(self) -> None:
        """Raises _TooManySteps when none is left."""
        self._steps -= 1
        if self._steps < 0:
            raise _TooManySteps


class _TooManySteps(Exception):
    """A check that would take too long."""


_turn: ContextVar[Toolbox] = ContextVar("turn")  # whose steps are counted


def kind(value: Any) -> str:
    """The JSON type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


@lru_cache(maxsize=256)
def _validators(described: str) -> Mapping[str, Validator]:
    """A validator of the arguments of each tool of a JSON list, by its name. Raises DataError."""
    found: dict[str, Validator] = {}
    for i, tool in enumerate(json.loads(described)):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            expected = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            raise DataError(f"tools[{i}]: expected {expected}, got {json.dumps(tool)[:80]}")
        if name in found:
            raise DataError(f"tools[{i}]: name '{name}' was used before; names must be unique")
        try:
            found[name] = _validator(function.get("parameters", _NO_PARAMETERS))
        except SchemaError as error:
            raise DataError(f"tools[{i}] '{name}': parameters are no JSON schema: {error.message[:120]}") from None
        except Unresolvable as error:
            raise DataError(f"tools[{i}] '{name}': reference '{error.ref}' leads nowhere; write it in $defs") from None
        except RecursionError:
            raise DataError(f"tools[{i}] '{name}': parameters are nested too deeply") from None
    return found


def _validator(schema: Any) -> Validator:
    """Raises SchemaError, Unresolvable, RecursionError."""
    if isinstance(schema, Mapping):
        # $schema would choose a validator that counts no steps
        schema = {key: value for key, value in schema.items() if key != "$schema"}
    Draft202012Validator.check_schema(schema)
    registry: Registry[Any] = Registry()
    resolver = registry.resolver_with_root(DRAFT202012.create_resource(schema))
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            for reference in (part.get("$ref"), part.get("$dynamicRef")):
                if isinstance(reference, str):
                    resolver.lookup(reference)
            pending += [value for key, value in part.items() if key not in ("const", "enum", "default", "examples")]
        elif isinstance(part, list):
            pending += part
    return _Checker(schema, registry=registry)


_Keyword: TypeAlias = Callable[[Any, Any, Any, Any], Any]


def _counted(keyword: _Keyword) -> _Keyword:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _turn.get().count_step()
        return keyword(validator, value, instance, schema)

    return counted


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """uniqueItems in linear time; jsonschema compares all pairs where items cannot be sorted."""
    if unique and isinstance(instance, list) and len({_hashable(item) for item in instance}) < len(instance):
        yield ValidationError("items are not unique")


def _hashable(value: Any) -> Any:
    """Equal for equal JSON values: 1 is 1.0, and not true."""
    match value:
        case list():
            return ("array", tuple(_hashable(item) for item in value))
        case dict():
            return ("object", frozenset((key, _hashable(item)) for key, item in value.items()))
        case _:
            return (kind(value), value)


_Checker = validators.extend(
    Draft202012Validator,
    {name: _counted(keyword) for name, keyword in Draft202012Validator.VALIDATORS.items()}
    | {"uniqueItems": _counted(_unique_items)},
)
