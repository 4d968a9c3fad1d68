"""Prompts from a user's own data: Python objects, data sets, and files of other formats than JSON lines; columns by other names."""

import json
import sys
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from factories import prompt

from opd.config import FileTask, load_config
from opd.data import read_prompts, read_prompts_from
from opd.data.tasks import PromptFile
from opd.errors import DataError
from opd.records import Prompt

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
RECORDS = [
    {"id": "a", "prompt": "2 + 2?", "answer": "4", "level": 3},
    {"prompt": [USER], "completion": [ANSWER]},
    {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    {"prompt": "2 + 3?"},
]


def made(records: Any, **options: Any) -> list[Prompt]:
    return read_prompts_from(records, **({"task": "sums", "teacher": "t"} | options))


def refused(records: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        made(records, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def from_file(folder: Path, name: str, content: str | bytes | list[Any], **options: Any) -> list[Prompt]:
    path = folder / name
    if isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(path, **({"task": "sums", "teacher": "t"} | options))


def refused_file(folder: Path, name: str, content: str | bytes | list[Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        from_file(folder, name, content, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder / name}")


# --- Python ---


def test_python_records_give_the_prompts_that_a_file_of_them_gives(tmp_path):
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    assert made(RECORDS) == from_file(tmp_path, "p.jsonl", lines)
    assert made(iter(RECORDS)) == made(RECORDS)


def test_texts_are_prompts_with_ids_made_from_their_content():
    one, two, again = made(["2 + 2?", "2 + 3?", "2 + 2?"])
    assert [dict(m) for m in one.messages] == [USER]
    assert again.id == f"{one.id}-2"
    assert [one.id] == [p.id for p in made([{"prompt": "2 + 2?"}])]
    assert two.id != one.id


def test_prompt_objects_are_kept_and_checked_like_records():
    own = replace(prompt(), task="sums")
    kept, other = made([own, "2 + 2?"])
    assert kept is own
    assert other.task == "sums"
    assert refused(["x", prompt()]).startswith("prompts[1]: prompt '")
    assert refused([own, own]) == f"prompts[1]: id '{own.id}' was used in prompts[0]; ids must be unique"
    empty = Prompt("p", (), teacher="t", task="sums")
    assert refused([empty]) == "prompts[0]: there are no messages"
    wrong = Prompt("p", (USER,), teacher="t", task="sums", answer="four")
    assert "prompts[0]: prompt 'p': answer 'four' is no number" in refused([wrong], verifiers=("number",))


def test_values_of_libraries_become_plain_python():
    record = {
        "id": np.int64(7),
        "prompt": np.str_("2 + 2?"),
        "answer": np.float64(4.5),
        "score": torch.tensor(0.5),
        "flags": np.array([True, False]),
        "size": pa.scalar(3),
        "day": date(2026, 1, 2),
        "price": Decimal("1.10"),
        "meta": {"pair": (np.int8(1), None)},
    }
    [found] = made([record])
    assert (found.id, found.answer) == ("sums:7", "4.5")
    assert type(found.messages[0]["content"]) is str
    expected = {
        "score": 0.5,
        "flags": [True, False],
        "size": 3,
        "day": "2026-01-02",
        "price": "1.10",
        "pair": [1, None],
    }
    assert json.dumps(dict(found.meta), sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "prompts: no prompts; expected at least one record"),
        ("2 + 2?", "prompts is str, expected an iterable of records"),
        (3, "prompts is int, expected an iterable of records"),
        ({"train": [], "test": []}, "prompts is a dict of 'train', 'test'; pass a list of records, or one split"),
        (["x", 3], "prompts[1]: expected an object of keys and values, got int"),
        (["x", " "], "prompts[1]: 'prompt' is empty or no string: ' '"),
        ([{"prompt": "x", "anwser": "4"}], "prompts[0]: unknown key 'anwser'; did you mean 'answer'?"),
        ([{"prompt": "x", 3: "4"}], "prompts[0]: a key is 3, expected a string"),
        ([{"prompt": "x", "meta": {3: 4}}], "prompts[0]: a key of 'meta' is 3, expected a string"),
        ([{"prompt": "x", "score": float("nan")}], "prompts[0]: 'score' is nan, which is no JSON number; write a number,"),
        ([{"prompt": "x", "raw": [b"x"]}], "prompts[0]: 'raw'[0] is of type bytes, expected text, a number, a list or"),
        ([{"prompt": "x\ud800"}], "prompts[0]: 'prompt' contains a lone surrogate"),
        ([{"prompt": "x"}, {"messages": [USER, ANSWER]}], "prompts[1]: the last message is the assistant's, and"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named_by_its_place(records, reason):
    assert refused(records).startswith(reason)


def test_errors_name_the_argument_where_no_recipe_is():
    assert refused(["x"], teacher=None) == 'prompts[0]: no teacher; add "teacher" to the record or set teacher'
    assert "set completion = 'drop' to cut it off" in refused([{"messages": [USER, ANSWER]}])
    assert "so completion = 'drop' has no effect" in refused(["x"], completion="drop")


def test_a_value_within_itself_is_refused():
    record: dict[str, Any] = {"prompt": "x"}
    record["self"] = record
    assert "is nested deeper than 64 levels" in refused([record])


def test_a_data_frame_is_refused_with_the_remedy():
    class Frame:
        columns = ("prompt",)

        def __iter__(self):
            return iter(self.columns)

    assert refused(Frame()) == "prompts is a data frame; pass its rows, such as frame.to_dict('records')"


def test_a_column_beside_the_one_that_it_resembles_is_kept():
    [found] = made([{"prompt": "x", "answer": "4", "answers": ["4", "four"]}])
    assert found.answer == "4"
    assert dict(found.meta) == {"answers": ["4", "four"]}


# --- data sets ---


def test_a_data_set_gives_the_prompts_of_its_rows():
    rows = [
        {"id": "a", "messages": [USER], "level": 1},
        {"id": "b", "messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}, USER], "level": None},
    ]
    rows[1]["messages"].insert(0, USER)
    found = made(datasets.Dataset.from_list(rows))
    assert [p.id for p in found] == ["sums:a", "sums:b"]
    assert dict(found[0].meta) == {"level": 1}
    assert dict(found[1].meta) == {}
    assert found[1].messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    split = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    assert refused(split) == "prompts is a DatasetDict of 'train'; pass a list of records, or one split"


def test_a_table_of_pyarrow_gives_the_prompts_of_its_rows():
    rows = [{"prompt": "a", "answer": "4"}, {"prompt": "b", "answer": None}]
    assert made(pa.Table.from_pylist(rows)) == made([rows[0], {"prompt": "b"}])


# --- columns ---


def test_columns_are_read_under_the_keys_that_they_are_mapped_to():
    records = [{"uid": 1, "question": "2 + 2?", "solution": "4", "source": "web"}, {"uid": 2, "question": "2 + 3?"}]
    first, second = made(records, columns={"id": "uid", "prompt": "question", "answer": "solution"})
    assert (first.id, first.answer, dict(first.meta)) == ("sums:1", "4", {"source": "web"})
    assert [dict(m) for m in first.messages] == [USER]
    assert (second.id, second.answer) == ("sums:2", None)


def test_a_field_whose_key_a_column_takes_goes_into_meta():
    [found] = made([{"prompt": "x", "answer": "2 + 2 = 4", "final": "4"}], columns={"answer": "final"})
    assert (found.answer, dict(found.meta)) == ("4", {"answer": "2 + 2 = 4"})
    [swapped] = made([{"prompt": "4", "answer": "x"}], columns={"prompt": "answer", "answer": "prompt"})
    assert (swapped.messages[0]["content"], swapped.answer, dict(swapped.meta)) == ("x", "4", {})


def test_a_column_chooses_among_several_conversations():
    record = {"prompt": "2 + 2?", "messages": [USER, ANSWER]}
    assert "columns.prompt); the record has 'prompt', 'messages'" in refused([record])
    [found] = made([record], columns={"messages": "messages"}, completion="answer")
    assert (dict(found.messages[0]), found.answer, dict(found.meta)) == (USER, "4", {"prompt": "2 + 2?"})
    [found] = made([record], columns={"prompt": "prompt"})
    assert (dict(found.messages[0]), dict(found.meta)) == (USER, {"messages": [USER, ANSWER]})


def test_an_id_of_the_content_does_not_depend_on_the_names_of_columns():
    [plain], [mapped] = made(["x"]), made([{"question": "x"}], columns={"prompt": "question"})
    assert plain.id == mapped.id


def test_a_repeated_id_of_a_mapped_column_is_refused():
    message = refused([{"uid": 1, "prompt": "x"}, {"uid": 1, "prompt": "y"}], columns={"id": "uid"})
    assert message == "prompts[1]: id 'sums:1' was used in prompts[0]; ids must be unique"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "qestion"}, ": no record has 'qestion' (tasks.sums.columns.prompt); did you mean 'question'?"),
        ({"prompt": "zzz"}, ": no record has 'zzz' (tasks.sums.columns.prompt); the first record has 'question', 'key'"),
        ({"promt": "question"}, "tasks.sums.columns.promt: 'promt' is no key of a record; did you mean 'prompt'?; known: id,"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_refused_with_the_nearest(tmp_path, columns, reason):
    assert refused_file(tmp_path, "p.jsonl", '{"question": "x", "key": 1}', columns=columns).startswith(reason)


def test_a_recipe_names_the_columns_of_a_file_task(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "x", "solution": "4"}\n')
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"""output = "o"
        student = "s"
        teachers.t.model = "m"
        tasks.sums = {{ type = "file", path = "{path}", teacher = "t", columns = {{ prompt = "question" }} }}"""
    )
    task = load_config(recipe, ["tasks.sums.columns.answer=solution"]).tasks["sums"]
    assert isinstance(task, FileTask)
    [found] = PromptFile("sums", task).prompts("train")
    assert (found.messages[0]["content"], found.answer) == ("x", "4")


# --- files ---


def test_one_json_array_is_read_like_lines(tmp_path):
    text = json.dumps(RECORDS, indent=2)
    assert from_file(tmp_path, "p.json", text) == from_file(tmp_path, "p.jsonl", text) == made(RECORDS)
    assert refused_file(tmp_path, "p.json", '[{"prompt": "x"}, {"prompt": ""}]').startswith(
        ", record 2: 'prompt' is empty"
    )
    assert refused_file(tmp_path, "p.json", '[{"prompt": "x"}, 3]').startswith(", record 2: expected an object")
    assert refused_file(tmp_path, "p.json", '[{"prompt": "x"},\n').startswith(": not valid JSON: ")
    assert refused_file(tmp_path, "p.json", "[]") == ": no prompts; expected at least one record"


def test_csv_is_read_by_its_header(tmp_path):
    text = 'id,question,answer\r\na,"2 + 2,\n""please""?",4\r\n\r\nb,2 + 3?,\r\n'
    first, second = from_file(tmp_path, "p.csv", b"\xef\xbb\xbf" + text.encode(), columns={"prompt": "question"})
    assert (first.id, first.messages[0]["content"], first.answer) == ("sums:a", '2 + 2,\n"please"?', "4")
    assert (second.id, second.answer) == ("sums:b", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ": no prompts; expected at least one record"),
        ("prompt\n", ": no prompts; expected at least one record"),
        ('id,prompt\na,"x\ny"\nb, \n', ", line 4: 'prompt' is empty or no string"),
        ("id,prompt\na,x,y\n", ", line 2: 3 cells, expected 2, one a column"),
        ("id,prompt\na\n", ", line 2: 1 cells, expected 2, one a column"),
        ("id,prompt,id\na,x,b\n", ", line 1: column 'id' occurs twice; keep one"),
        ('prompt\nx\n"y\n', ", line 3: not valid CSV: unexpected end of data"),
        ("prompt\nx\ud800\n".encode("utf-8", "surrogatepass"), ", line 2: not UTF-8"),
    ],
)
def test_a_faulty_csv_is_named_by_file_and_line(tmp_path, text, reason):
    assert refused_file(tmp_path, "p.csv", text).startswith(reason)


def test_parquet_gives_the_prompts_of_the_same_lines(tmp_path):
    rows = [RECORDS[0], {"id": "b", "prompt": "2 + 3?", "answer": "5", "level": 4}, {"prompt": "2 + 4?"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert from_file(tmp_path, "p.parquet", rows) == from_file(tmp_path, "p.jsonl", lines)
    assert from_file(tmp_path, "p.data", rows) == from_file(tmp_path, "p.jsonl", lines)
    [turns] = from_file(tmp_path, "q.parquet", [{"prompt": [USER], "completion": [ANSWER]}])
    assert [dict(m) for m in (*turns.messages, *turns.demonstration)] == [USER, ANSWER]


def test_a_faulty_parquet_is_named_by_file_and_row(tmp_path):
    assert refused_file(tmp_path, "p.parquet", [{"prompt": "x"}, {"prompt": ""}]).startswith(
        ", row 2: 'prompt' is empty"
    )
    assert refused_file(tmp_path, "p.parquet", b"no parquet").startswith(": cannot be read as Parquet: ")
    assert refused_file(tmp_path, "p.jsonl", b"PAR1....").startswith(": cannot be read as Parquet: ")


def test_parquet_without_its_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs a package that is not installed: pip install 'opd\[datasets\]'$"):
        read_prompts(tmp_path / "p.parquet", task="sums", teacher="t")
