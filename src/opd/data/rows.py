"""Records from files (JSON lines, JSON, CSV, Parquet) and from Python, as plain data: an error names the line, row or place."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import DataError, one_line
from opd.records import Prompt

Rows: TypeAlias = Iterator[tuple[str, dict[str, Any] | Prompt]]
"""Records, each behind its place in an error message, such as "train.jsonl, line 3" or "prompts[2]"."""

_OTHER_FORMATS = (
    (b"\x1f\x8b", "is compressed (gzip); unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd); unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
)
_PARQUET = b"PAR1"
_MAX_DEPTH = 64
_BYTE_ORDER_MARK = "\ufeff"
_NO_TEXT = re.compile("[\ud800-\udfff\0]")


def rows_of_file(path: str | Path, key: str) -> Rows:
    """The records of a file of JSON lines, of one JSON array, of CSV (.csv, with a header) or of Parquet.

    key: the key of the recipe that names the file. Raises DataError that names the file, and the line or row where there is one.
    """
    raw = _content(path, key)
    if raw.startswith(_PARQUET) or Path(path).suffix.lower() == ".parquet":
        return _parquet_rows(path, raw)
    for start, advice in _OTHER_FORMATS:
        if raw.startswith(start):
            raise DataError(f"prompt file '{path}' {advice} ({key})")
    try:
        text = raw.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: {error.reason}; save the file as UTF-8") from None
    if Path(path).suffix.lower() == ".csv":
        return _csv_rows(path, text)
    return _array_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text)


def rows_of_records(records: Any) -> Rows:
    """The items of an iterable: records, texts, and `Prompt` objects; also those of a pyarrow table and of a `datasets.Dataset`.

    Raises DataError that names the item: "prompts[17]".
    """
    arrow = hasattr(records, "features")  # a data set of `datasets`
    if hasattr(records, "to_pylist"):
        records, arrow = records.to_pylist(), True
    if isinstance(records, Mapping):
        keys = ", ".join(repr(str(key)) for key in list(records)[:4])
        raise DataError(f"prompts is a {type(records).__name__} of {keys}; pass a list of records, or one split")
    if hasattr(records, "columns"):  # a data frame, which iterates over its columns
        raise DataError("prompts is a data frame; pass its rows, such as frame.to_dict('records')")
    if isinstance(records, str | bytes) or not isinstance(records, Iterable):
        raise DataError(f"prompts is {type(records).__name__}, expected an iterable of records")
    for place, record in enumerate(records):
        where = f"prompts[{place}]"
        if isinstance(record, str):
            record = {"prompt": record}
        yield where, record if isinstance(record, Prompt) else _located(record, where, arrow=arrow)


def strict_json(text: str) -> Any:
    """The value of a JSON text, in which every number is finite and no key of an object occurs twice; raises DataError."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise DataError(f"not valid JSON: {error}") from None


def plain_data(value: Any, name: str, *, strict: bool = True, depth: int = 0) -> Any:
    """The value as data that JSON can hold: scalars and arrays of numpy, torch and pyarrow become numbers and lists, dates text.

    Raises DataError that begins with the name of the value (`meta.level[2]`): for a lone surrogate or NUL in a text, for more than
    64 levels and, where it is strict, for NaN, infinity and objects of other kinds. Otherwise such objects stay as they are.
    """
    if depth > _MAX_DEPTH:
        raise DataError(f"{name[:80]}... is nested deeper than {_MAX_DEPTH} levels")
    if strict:
        value = _python_value(value, name)
    if isinstance(value, str):
        _require_text(value, name)
    elif isinstance(value, Mapping):
        for key in value:
            if isinstance(key, str):
                _require_text(key, f"a key of {name}")
            elif strict:
                raise DataError(f"a key of {name} is {key!r:.40}, expected a string")
        return {k: plain_data(v, f"{name}.{k}", strict=strict, depth=depth + 1) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        return [plain_data(v, f"{name}[{i}]", strict=strict, depth=depth + 1) for i, v in enumerate(value)]
    return value


def _python_value(value: Any, name: str) -> Any:
    """A value of a library as Python's own; raises DataError for one that is no plain data."""
    for method in ("as_py", "tolist"):  # of pyarrow; of numpy, torch and pandas
        if callable(getattr(value, method, None)):
            value = getattr(value, method)()
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{name} is {value}, which is no JSON number; write a number, or null (None)")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if value is not None and not isinstance(value, str | int | float | Mapping | list | tuple):
        raise DataError(f"{name} is of type {type(value).__name__}, expected text, a number, a list or an object")
    return value


def _require_text(text: str, name: str) -> None:
    found = _NO_TEXT.search(text)
    if found is not None:
        what = "the character U+0000" if found[0] == "\0" else f"a lone surrogate ({found[0]!a}, half of a character)"
        raise DataError(f"{name} contains {what} at position {found.start() + 1}, which is not valid text; remove it")


def _located(record: Any, where: str, *, arrow: bool = False) -> dict[str, Any]:
    """A record as plain data; its errors begin with `where`. arrow: an empty field of it may stand for an absent one."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object of keys and values, got {type(record).__name__}")
    try:
        for key in record:
            if not isinstance(key, str):
                raise DataError(f"a key is {key!r:.40}, expected a string")
            _require_text(key, "a key")
        plain = {key: plain_data(value, f"'{key}'") for key, value in record.items()}
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return _without_nulls(plain) if arrow else plain


def _without_nulls(value: Any) -> Any:
    """Data without the empty fields that Arrow gives to every record of a column where one record has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _content(path: str | Path, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"prompt file '{path}' does not exist ({key})") from None
    except IsADirectoryError:
        raise DataError(f"prompt file '{path}' is a folder; name a file in it ({key})") from None
    except OSError as error:
        raise DataError(f"prompt file '{path}' cannot be read: {error.strerror} ({key})") from None
    except ValueError as error:  # a path with a NUL
        raise DataError(f"prompt file {str(path)!a} cannot be read: {error} ({key})") from None


def _line_rows(path: str | Path, text: str) -> Rows:
    # only newlines end a record: JSON allows U+2028 and others of its kind within a string
    for number, line in enumerate(text.split("\n"), 1):
        line, where = line.removeprefix(_BYTE_ORDER_MARK), f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = strict_json(line)
        except DataError as error:
            if line.strip() == "{":
                raise DataError(f"{where}: the object does not end on its line; write one record a line") from None
            raise DataError(f"{where}: {error}") from None
        yield where, _located(record, where)


def _array_rows(path: str | Path, text: str) -> Rows:
    try:
        records = strict_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        yield where, _located(record, where)


def _csv_rows(path: str | Path, text: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    where = f"{path}, line 1"
    try:
        for cells in reader:
            if not header:
                header = cells
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise DataError(f"{where}: column {twice!a} occurs twice; keep one")
            elif cells:
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells, expected {len(header)}, one a column")
                yield where, _located({n: c for n, c in zip(header, cells, strict=True) if c}, where)
            where = f"{path}, line {reader.line_num + 1}"
    except csv.Error as error:
        raise DataError(f"{where}: not valid CSV: {error}") from None


def _parquet_rows(path: str | Path, raw: bytes) -> Rows:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]  # an extra
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs a package that is not installed: pip install 'opd[datasets]'"
        ) from None
    try:
        records = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(str(error))[:200]}") from None
    for number, record in enumerate(records, 1):
        where = f"{path}, row {number}"
        yield where, _located(record, where, arrow=True)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"key {repeated!a} occurs twice; keep one")
    return found


def _constant(name: str) -> Any:
    raise DataError(f"not valid JSON: {name} is no JSON number; write a number, or null")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise DataError(f"number {number[:40]} is too large")
    return value
