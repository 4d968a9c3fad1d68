"""Files of one JSON object a line, read strictly: an error names the line of a bad text, number or record."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.errors import DataError

_OTHER_FORMATS = (
    (b"\x1f\x8b", "is compressed (gzip); unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd); unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"PAR1", "is a Parquet file; write it as JSON lines, such as with pandas' to_json(orient='records', lines=True)"),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
)
_MAX_DEPTH = 64
_BYTE_ORDER_MARK = "\ufeff"
_NO_TEXT = re.compile("[\ud800-\udfff\0]")


def read_json_lines(path: str | Path, key: str) -> list[tuple[int, dict[str, Any]]]:
    """The records of a file, each with its line, empty lines apart; `key` is the key of the recipe that names the file.

    Raises DataError naming the file, and the line where there is one.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    # only newlines end a record: JSON allows U+2028 and others of its kind within a string
    for number, line in enumerate(_text(path, key).split("\n"), 1):
        line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            try:
                found.append((number, _record(line)))
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    return found


def text_fault(value: Any, name: str, *, depth: int = 0) -> str:
    """What in a value is no text, and where: a lone surrogate or a NUL in any of its strings; "" where all is text.

    name: of the value; depth: in how many others it stands, of which there may be 64.
    """
    if depth > _MAX_DEPTH:
        return f"{name[:80]}... is nested deeper than {_MAX_DEPTH} levels"
    if isinstance(value, str):
        found = _NO_TEXT.search(value)
        if found is None:
            return ""
        what = "the character U+0000" if found[0] == "\0" else f"half of a character ({found[0]!a}, a lone surrogate)"
        return f"{name} has {what} at place {found.start() + 1}, which is no text; remove it"
    if isinstance(value, Mapping):
        for key, item in value.items():
            if fault := text_fault(key, f"a key of {name}") or text_fault(item, f"{name}.{key}", depth=depth + 1):
                return fault
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            if fault := text_fault(item, f"{name}[{place}]", depth=depth + 1):
                return fault
    return ""


def strict_json(text: str) -> Any:
    """The value of a JSON text, in which every number is finite and no key of an object stands twice; raises DataError."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise DataError(f"not valid JSON: {error}") from None


def _text(path: str | Path, key: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"prompt file '{path}' does not exist ({key})") from None
    except IsADirectoryError:
        raise DataError(f"prompt file '{path}' is a folder; name a .jsonl file ({key})") from None
    except OSError as error:
        raise DataError(f"prompt file '{path}' cannot be read: {error.strerror} ({key})") from None
    except ValueError as error:  # a path with a NUL
        raise DataError(f"prompt file {str(path)!a} cannot be read: {error} ({key})") from None
    for start, advice in _OTHER_FORMATS:
        if raw.startswith(start):
            raise DataError(f"prompt file '{path}' {advice} ({key})")
    try:
        text = raw.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: {error.reason}; save the file as UTF-8") from None
    _require_lines(path, text)
    return text


def _require_lines(path: str | Path, text: str) -> None:
    """Raise DataError for one JSON value that is written over the whole file."""
    first = text.lstrip().partition("\n")[0].strip()
    if first.startswith("[{") or first in ("[", "{"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            return
        kind = "array" if isinstance(whole, list) else "object"
        raise DataError(
            f"{path}: is one JSON {kind}; write one record a line, such as with: jq -c '{'.[]' if kind == 'array' else '.'}' "
            f"{shlex.quote(str(path))} > records.jsonl"
        )


def _record(line: str) -> dict[str, Any]:
    record = strict_json(line)
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {type(record).__name__}")
    if fault := next((found for key, value in record.items() if (found := _field_fault(key, value))), ""):
        raise DataError(fault)
    return record


def _field_fault(key: str, value: Any) -> str:
    return text_fault(key, "a key") or text_fault(value, f"'{key}'")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"key {repeated!a} stands twice; keep one")
    return found


def _constant(name: str) -> Any:
    raise DataError(f"not valid JSON: {name} is no JSON number; write a number, or null")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise DataError(f"number {number[:40]} is too large")
    return value
