"""The pages of docs/reference/ that are generated from the code: `python -m opd.reference docs/reference` writes them.

A page has no text of its own beyond an introduction: descriptions of keys are the docstrings of `opd.config`, those of commands
the help of `opd.cli`, those of metrics the table of `opd.step_metrics`.
"""

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from opd import cli, step_metrics
from opd.config import Config, SftConfig
from opd.config.detectors import DetectorConfig, DetectorsConfig
from opd.config.parse import IN_EVALUATION, MAY_CHANGE, MAY_NOT_CHANGE, ON_REQUEST
from opd.config.tree import SftEvaluationConfig
from opd.data import prompts
from opd.rewards import verifiers
from opd.rewards.format_checks import CHECKS

Table = type[BaseModel]
_WIDTH = 100
_MAX_CHOICES = 8  # more names than these have a table of their own
_KINDS: Mapping[Any, str] = MappingProxyType(
    {int: "integer", float: "number", str: "text", bool: "`true`, `false`", datetime: "date and time", Any: "any value"}
)
_SENTENCE = re.compile(r'(?<=\.)\s+(?=[A-Z0-9"`(]|opd )')

_CONFIGURATION = """
# Configuration

This page lists every key of a recipe with its type, default and meaning. Notes under a table give
limits, and the reason for a default.

A recipe is a TOML file. `KEY=VALUE` on the command line overrides a key, and `--KEY VALUE` means
the same:

    opd train recipes/merge.toml optimizer.lr=1e-5 student=Qwen/Qwen3-1.7B
    opd train recipes/merge.toml --steps 3 --optimizer.warmup_steps 1

- opd refuses unknown keys and names the nearest known key. It answers names of TRL, verl, PEFT and
  transformers, such as `learning_rate`, with the name of its own key.
- opd refuses a key that has no effect, or names it in a line `warning: no effect: KEY: REASON`.
- Paths are relative to the folder in which the command runs.
- The run folder keeps the resolved recipe as `config.json`.

`make reference` generates this page from `src/opd/config/`.
"""

_FORMAT_CHECKS = """
The rules of `tasks.NAME.checks`. opd counts each error that a rule finds (`format/RULE/sum`,
`format/errors/mean`) and keeps its tokens with the rollout. What an error costs is up to
`[mask]` and `reward.format_error`.
"""

_RESUME = """
## Keys that may change in a run

`opd train --resume RUN KEY=VALUE ...` and `Trainer(run).resume([...])` accept three kinds of keys.
opd prints each change, and `config.json` in the run folder keeps it. opd compares teachers, base
and prompts with those of the start.
"""

_COMMANDS = """
# Commands

This page lists every command of `opd` with its arguments and options. `opd COMMAND --help` prints
the same texts.

A command ends with exit code 0, or 1 if a claim of `opd theory` fails. It ends with 2 and one line
on stderr for an error that you can fix, and with 130 after an interrupt.

`make reference` generates this page from `src/opd/cli.py`.
"""


class Key(NamedTuple):
    """A row of a table of keys. description: the first sentence goes into the row, the others into the notes below the table."""

    name: str
    kind: str
    default: str
    description: str


def configuration() -> str:
    """The text of docs/reference/configuration.md."""
    shared = [name for name in SftConfig.model_fields if _same(SftConfig, Config, name)]
    named = _listed([f"[{name}]" if _tables(SftConfig.model_fields[name].annotation) else name for name in shared])
    own = [key for key in keys(SftConfig) if key.name not in shared]
    shown: set[str] = set()
    return _page(
        _CONFIGURATION,
        "## Keys of `opd train`",
        *_rows_and_notes(keys(Config), shown),
        *(part for name, tables in sections(Config) for part in _section(name, tables, shown)),
        "## Keys of `opd sft`",
        _wrapped(_doc(SftConfig)),
        _wrapped(f"These keys and tables are those of `opd train`: {named}."),
        *_rows_and_notes(own, shown),
        "### `[evaluation]` of `opd sft`",
        *_rows_and_notes(keys(SftEvaluationConfig), shown),
        "## Records",
        _rewrapped(prompts.__doc__ or ""),
        "## Verifiers",
        _rewrapped(verifiers.__doc__ or ""),
        *_format_checks(),
        *_resumable(),
    )


def commands() -> str:
    """The text of docs/reference/cli.md."""
    group: Any = typer.main.get_command(cli.app)
    return _page(_COMMANDS, *(part for name, command in group.commands.items() for part in _command(name, command)))


PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"configuration.md": configuration, "metrics.md": step_metrics.reference, "cli.md": commands}
)


def keys(table: Table, *, own: bool = False) -> list[Key]:
    """The keys of one table of a recipe that hold values. own: without those of the classes above it."""
    return [
        Key(name, _kind(field.annotation, field.metadata), _default(field), " ".join((field.description or "").split()))
        for name, field in table.model_fields.items()
        if name != "type" or not _is_variant(table)
        if not _tables(field.annotation) and (not own or name in inspect.get_annotations(table))
    ]


def sections(table: Table, above: str = "") -> Iterator[tuple[str, list[Table]]]:
    """(dotted name, the tables that may stand there) of everything below this table, in its order.

    NAME stands for a name that the recipe chooses.
    """
    for name, field in table.model_fields.items():
        path = above + name + (".NAME" if get_origin(field.annotation) is dict else "")
        if found := _tables(field.annotation):
            yield path, found
            yield from sections(found[0], f"{path}.")  # variants share the tables in them


def _section(name: str, tables: Sequence[Table], shown: set[str]) -> Iterator[str]:
    """The parts of the page for the tables that may stand under one name."""
    yield f"{'###' if name.startswith('detectors.') else '##'} `[{name}]`"
    if len(tables) > 1:
        yield from _variants(tables, shown)
        return
    yield _wrapped(_doc(tables[0]))
    yield from _rows_and_notes(keys(tables[0]), shown)
    if tables[0] is DetectorsConfig:
        yield "### Keys of every detector"
        yield from _rows_and_notes(keys(DetectorConfig), shown)


def _variants(tables: Sequence[Table], shown: set[str]) -> Iterator[str]:
    """The tables among which `type` chooses: the keys that several of them share, then those of each."""
    types = {table: _kind(table.model_fields["type"].annotation) for table in tables}
    yield _rows(("`type`", "meaning"), [(types[table], _first_sentence(_doc(table))) for table in tables])
    for base in dict.fromkeys(table.__mro__[1] for table in tables):
        yield f"### Keys with `type` = {' or '.join(types[table] for table in tables if table.__mro__[1] is base)}"
        yield _wrapped(_doc(base))
        yield from _rows_and_notes(keys(base), shown)
    for table in tables:
        if found := keys(table, own=True):
            yield f"### More keys with `type` = {types[table]}"
            yield _wrapped(_doc(table))
            yield from _rows_and_notes(found, shown)


def _format_checks() -> list[str]:
    rows = [(f"`{name}`", _first_sentence(inspect.getdoc(check) or "")) for name, check in CHECKS.items()]
    return ["## Format checks", _FORMAT_CHECKS, _rows(("rule", "finds"), rows)]


def _resumable() -> list[str]:
    evaluated = _listed([IN_EVALUATION])
    rows = [
        (
            "always",
            f"{_listed([key.replace('.*.', '.NAME.') for key in MAY_CHANGE])}, except {_listed(MAY_NOT_CHANGE)}",
        ),
        ("always", "`steps`, if it is not below the steps that are done; a schedule then follows the new number"),
        ("with `--allow-changes`", f"{_listed(ON_REQUEST)}; `changes.jsonl` in the run folder keeps them"),
        ("never", "all others, because they change what the run learns"),
    ]
    return [
        _RESUME.strip(),
        "\n".join(_bullet(f"{when}: {which}") for when, which in rows),
        _wrapped(
            f"`opd eval RUN KEY=VALUE ...` takes {evaluated}, and those of the first kind that an evaluation uses."
        ),
    ]


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    shown = [_metavar(p) for p in arguments]
    yield f"## `opd {name}`"
    yield "    " + " ".join(["opd", name, *(["[OPTIONS]"] if options else []), *shown])
    yield from map(_wrapped, inspect.cleandoc(command.help).split("\n\n"))
    rows = [(_metavar(p), "required" if p.required else "", p.help) for p in arguments]
    rows += [("`, `".join(_spelled(p)), "required" if p.required else _shown(p.default), p.help) for p in options]
    yield _rows(
        ("argument or option", "default", "meaning"), [(f"`{word}`", default, text) for word, default, text in rows]
    )
    title, *examples = (command.epilog or "").split("\n\n")
    if examples:
        yield title
        yield "\n".join(f"    {line}" for line in examples)


def _spelled(option: Any) -> list[str]:
    """The option with the name of its value, unless it is a flag."""
    value = "" if option.is_flag else f" {_metavar(option)}"
    return [spelling + value for spelling in option.opts]


def _metavar(param: Any) -> str:
    """The name of a value in a usage line; an option's is the last part of its own, such as TOKENS of --prompt-tokens."""
    return param.metavar or param.name.upper().rpartition("_")[2]


def _shown(default: Any) -> str:
    return "" if default is None or default is False else f"`{default}`"


def _page(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _rows_and_notes(found: Sequence[Key], shown: set[str]) -> list[str]:
    """The table of the keys, and a note for each description of several sentences that is not `shown` yet."""
    if not found:
        return []
    split = [(key, *_SENTENCE.split(key.description, maxsplit=1)) for key in found]
    notes = [_bullet(f"`{key.name}`: {rest[0]}") for key, _, *rest in split if rest]
    new = [note for note in notes if note not in shown]
    shown.update(notes)
    rows = [(f"`{key.name}`", key.kind, key.default, first) for key, first, *_ in split]
    return [_rows(("key", "type", "default", "meaning"), rows), "\n".join(new)]


def _first_sentence(doc: str) -> str:
    return _SENTENCE.split(" ".join(doc.split()))[0]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)


def _rewrapped(doc: str) -> str:
    """A docstring at the width of a page; its tables and indented blocks stay as they are."""
    blocks = []
    for block in inspect.cleandoc(doc).split("\n\n"):
        if block.startswith("- "):
            blocks.append(
                "\n".join(_bullet(" ".join(item.split())) for item in re.split(r"^- ", block, flags=re.M)[1:])
            )
        else:
            blocks.append(block if block.startswith(("|", "    ")) else _wrapped(block))
    return "\n\n".join(blocks)


def _bullet(text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _doc(table: Table) -> str:
    return inspect.cleandoc(table.__doc__ or "")


def _same(one: Table, other: Table, name: str) -> bool:
    """Whether both tables have this key, with the same values and meaning."""
    fields = [table.model_fields.get(name) for table in (one, other)]
    return None not in fields and repr(fields[0]) == repr(fields[1])


def _tables(annotation: Any) -> list[Table]:
    """The tables that a value of this type may be, alone or under names; none for a plain value."""
    if get_origin(annotation) in (Annotated, dict, Union, UnionType):
        inner = get_args(annotation)
        inner = inner[:1] if get_origin(annotation) is Annotated else inner
        return [table for each in inner for table in _tables(each)]
    return [annotation] if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else []


def _is_variant(table: Table) -> bool:
    """Whether `type` chooses this table among others, so that it has one value here."""
    return len(get_args(table.model_fields["type"].annotation)) == 1


def _kind(annotation: Any, metadata: Sequence[Any] = (), *, plural: str = "") -> str:
    """The type of a value in words, with its range."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], [*metadata, *inner[1:]], plural=plural)
    if origin is Literal and len(inner) > _MAX_CHOICES:
        return "name" + plural
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_kind(each, metadata) for each in inner if each is not NoneType)
    if origin is list:
        return f"list of {_kind(inner[0], plural='s')}"
    if origin is dict:
        return "table" if inner[1] is Any else f"table of {_kind(inner[1], plural='s')}"
    if origin is tuple:
        return f"{len(inner)} {_kind(inner[0], plural='s')}"
    bounds = [bound for each in metadata for bound in (each.metadata if isinstance(each, FieldInfo) else [each])]
    return _KINDS[annotation] + plural + _range(bounds)


def _range(bounds: Sequence[Any]) -> str:
    """The range in words: " >= 1", " > 0" or " in (0, 1]"; "" without a bound."""
    low = high = said = ""
    for bound in bounds:
        match bound:
            case Ge(ge=least):
                low, said = f"[{least:g}", f" ≥ {least:g}"
            case Gt(gt=least):
                low, said = f"({least:g}", f" > {least:g}"
            case Le(le=most):
                high, said = f"{most:g}]", f" ≤ {most:g}"
            case Lt(lt=most):
                high, said = f"{most:g})", f" < {most:g}"
    return f" in {low}, {high}" if low and high else said


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return f"`{json.dumps(value)}`".replace("e-0", "e-")


def main() -> None:
    """Write every generated page into the folder that the command line names."""
    for name, text in PAGES.items():
        (Path(sys.argv[1]) / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
