"""Prompt files checked line by line, generated tasks, and verifiers."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import prompt, write_prompts

from opd.config import FileTask, ReasoningGymTask
from opd.data.prompts import read_prompts
from opd.data.tasks import PromptFile, make_tasks
from opd.errors import DataError
from opd.integrations.reasoning_gym import ReasoningGym
from opd.rewards.verifiers import VERIFIERS, exact, last_number, mathematical, nothing

GOOD = '{"id": "1", "prompt": "say a", "teacher": "t", "answer": "a"}'


def jsonl(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fault(path: Path, *, teacher: str | None = None) -> str:
    """The message of the DataError that reading this file raises: one line that names the file."""
    with pytest.raises(DataError) as caught:
        read_prompts(path, task="words", teacher=teacher)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def record(**changes: Any) -> str:
    return json.dumps({"id": "2", "prompt": "say b", "teacher": "t"} | changes)


# --- files ---


def test_a_good_file_gives_its_prompts_in_order(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say b"}]
    second = json.dumps({"id": 2, "messages": messages, "answer": 7, "meta": {"level": 3}})
    first, other = read_prompts(jsonl(tmp_path, GOOD, "", second), task="words", teacher="fallback")
    assert (first.id, first.teacher, first.task, first.answer) == ("words:1", "t", "words", "a")
    assert [dict(m) for m in first.messages] == [{"role": "user", "content": "say a"}]
    assert (other.id, other.teacher, other.answer) == ("words:2", "fallback", "7")
    assert [dict(m) for m in other.messages] == messages
    assert other.meta["level"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "2", "prompt": "say b"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["id", "2"]', "expected an object of keys and values, got list"),
        ("3", "expected an object of keys and values, got int"),
        (record(id="1"), "id 'words:1' was used in line 1; ids must be unique"),
        (record(id=1), "id 'words:1' was used in line 1; ids must be unique"),
        (record(prompt=""), "'prompt' is empty or no string: ''"),
        (record(prompt=" \n "), "'prompt' is empty or no string"),
        (record(prompt=["say b"]), "'prompt' is empty or no string"),
        (record(id=""), "'id' must be a non-empty string, got ''"),
        (record(id=None), "'id' must be a non-empty string, got None"),
        (record(id=[1]), "'id' must be a non-empty string, got [1]"),
        (record(anwser="b"), "unknown key 'anwser'; did you mean 'answer'?; known: id, prompt, messages"),
        (record(messages=[{"role": "user", "content": "x"}]), "give exactly one of 'messages' and 'prompt'"),
        ('{"id": "2", "teacher": "t"}', "give exactly one of 'messages' and 'prompt'"),
        ('{"id": "2", "prompt": "say b"}', 'no teacher; add "teacher" to the record or set tasks.words.teacher'),
        (record(teacher=3), 'no teacher; add "teacher" to the record or set tasks.words.teacher'),
        (record(answer=["b"]), "'answer' must be a string or a number, got list"),
        (record(meta="easy"), "'meta' must be an object, got str"),
    ],
)
def test_a_faulty_record_is_named_by_file_and_line(tmp_path, line, message):
    path = jsonl(tmp_path, GOOD, "", line)
    assert fault(path).startswith(f"{path}, line 3: {message}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "'messages' must be a non-empty list, got []"),
        ("say b", "'messages' must be a non-empty list, got 'say b'"),
        (
            [{"role": "user", "content": "x"}, {"role": "teacher", "content": "y"}],
            "messages[1] needs 'role' (one of system, user, assistant, tool), a string 'content'",
        ),
        ([{"content": "x"}], "messages[0] needs 'role'"),
        ([{"role": ["user"], "content": "x"}], "messages[0] needs 'role'"),
        ([{"role": "user"}], "messages[0] needs 'role'"),
        ([{"role": "user", "content": ["x"]}], "messages[0] needs 'role'"),
        (["x"], "messages[0] needs 'role'"),
        ([{"role": "user", "content": " "}], "every message is empty"),
    ],
)
def test_faulty_messages_are_named_by_file_line_and_place(tmp_path, messages, message):
    line = json.dumps({"id": "2", "teacher": "t", "messages": messages})
    path = jsonl(tmp_path, GOOD, line)
    assert fault(path).startswith(f"{path}, line 2: {message}")


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"id": "2", "prompt": "caf\xe9", "teacher": "t"}\n')
    message = fault(path)
    assert "not UTF-8" in message
    assert "line 2" in message


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    assert fault(path) == f"{path}: no prompts; expected at least one record"


def test_a_missing_file_is_named_with_the_key_of_the_recipe(tmp_path):
    path = tmp_path / "nowhere.jsonl"
    assert fault(path) == f"prompt file '{path}' does not exist (tasks.words.path)"


def test_a_folder_in_place_of_a_prompt_file_is_named(tmp_path):
    assert "folder" in fault(tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_separate_records(tmp_path, separator):
    # JSON allows these characters raw inside a string, and json.dumps(ensure_ascii=False) writes them so.
    text = f"one{separator}two"
    line = json.dumps({"id": "1", "prompt": text, "teacher": "t"}, ensure_ascii=False)
    [found] = read_prompts(jsonl(tmp_path, line), task="words")
    assert found.messages[0]["content"] == text


def test_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes((GOOD + "\r\n" + record() + "\r\n").encode())
    assert [p.id for p in read_prompts(path, task="words")] == ["words:1", "words:2"]


def test_the_splits_of_a_file_task_are_its_two_files(tmp_path):
    train, held_out = write_prompts(tmp_path / "a.jsonl", 5), write_prompts(tmp_path / "b.jsonl", 2)
    task = PromptFile("words", FileTask(type="file", path=train, held_out_path=held_out, teacher="t"))
    assert len(task.prompts("train")) == 5
    assert len(task.prompts("held_out")) == 2
    assert PromptFile("words", FileTask(type="file", path=train, teacher="t")).prompts("held_out") == []


def test_a_file_task_rewards_by_its_verifier_and_only_where_there_is_an_answer(tmp_path):
    path = write_prompts(tmp_path / "a.jsonl")
    task = PromptFile("words", FileTask(type="file", path=path, teacher="t"))
    assert task.reward(prompt(answer="a"), " a\n") == 1.0
    assert task.reward(prompt(answer="a"), "b") == 0.0
    assert task.reward(prompt(answer=None), "a") is None
    silent = PromptFile("words", FileTask(type="file", path=path, teacher="t", verifier="none"))
    assert silent.reward(prompt(answer="a"), "a") is None


# --- verifiers ---


@pytest.mark.parametrize(
    ("response", "answer", "worth"),
    [("a b", "a b", 1.0), (" a b\n", "a b", 1.0), ("a  b", "a b", 0.0), ("A b", "a b", 0.0), ("", "a", 0.0)],
)
def test_the_exact_verifier_forgives_only_white_space_around(response, answer, worth):
    assert exact(response, answer) == worth


@pytest.mark.parametrize(
    ("response", "answer", "worth"),
    [
        ("12", "12", 1.0),
        (r"so the answer is $\frac{1}{2}$", "0.5", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("13", "12", 0.0),
        ("no idea", "12", 0.0),
        ("", "12", 0.0),
    ],
)
def test_the_mathematical_verifier_compares_values(response, answer, worth):
    assert mathematical(response, answer) == worth


@pytest.mark.parametrize(
    ("response", "answer", "worth"),
    [
        ("14", "14", 1.0),
        ("7 + 7 equals 14.", "14", 1.0),
        ("It is 1,024.0", "1024", 1.0),
        ("5 - 9 = -4", "-4", 1.0),
        ("9-4", "4", 1.0),
        ("it is .5", "0.5", 1.0),
        ("\u22124", "-4", 1.0),
        ("options 1,2", "2", 1.0),
        ("1e3", "1000", 1.0),
        ("14,", "14", 1.0),
        ("It is 14.", "14", 1.0),
        ("12,345,678", "12345678", 1.0),
        ("1e99999999999999999999", "1", 0.0),
        ("\u22124", "4", 0.0),
        ("15 + 9 = A book", "24", 0.0),
        ("14 or 15", "14", 0.0),
        ("fourteen", "14", 0.0),
        ("", "14", 0.0),
    ],
)
def test_the_number_verifier_takes_the_last_number(response, answer, worth):
    assert last_number(response, answer) == worth


def test_an_answer_that_is_no_number_names_its_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "2 + 2?", "answer": "four"}) + "\n")
    with pytest.raises(DataError, match="prompt 'sums:a': answer 'four' is no number"):
        PromptFile("sums", FileTask(type="file", path=str(path), teacher="t", verifier="number")).prompts("train")


def test_the_verifier_called_none_gives_no_verdict():
    assert nothing("a", "a") is None


def test_every_verifier_of_a_recipe_is_there():
    named = FileTask.model_fields["verifier"].annotation.__args__
    assert set(VERIFIERS) == set(named)


# --- reasoning-gym ---

ADDITION = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}


def gym(**changes: Any) -> ReasoningGym:
    fields = {"dataset": "basic_arithmetic", "teacher": "t", "params": ADDITION, "size": 40, "held_out_size": 15}
    return ReasoningGym("sums", ReasoningGymTask(type="reasoning_gym", **(fields | changes)))


def question(item: Any) -> str:
    return item.messages[0]["content"]


def test_held_out_and_training_questions_are_disjoint_and_as_many_as_asked_for():
    task = gym()
    train, held_out = task.prompts("train"), task.prompts("held_out")
    assert (len(train), len(held_out)) == (40, 15)
    questions = [question(p) for p in (*train, *held_out)]
    assert len(set(questions)) == 55
    assert len({p.id for p in (*train, *held_out)}) == 55
    assert {p.teacher for p in train} == {"t"}
    assert {p.task for p in train} == {"sums"}


def test_splits_stay_disjoint_where_the_generator_repeats_itself():
    # One-digit sums: fewer than a hundred questions, so most of them come up again.
    task = gym(params=ADDITION | {"min_digits": 1, "max_digits": 1}, size=40, held_out_size=20)
    questions = [question(p) for split in ("train", "held_out") for p in task.prompts(split)]
    assert len(questions) == len(set(questions)) == 60


def test_generated_prompts_are_a_function_of_the_seed():
    first, again, other = gym(), gym(), gym(seed=5)
    assert [question(p) for p in first.prompts("train")] == [question(p) for p in again.prompts("train")]
    assert [question(p) for p in first.prompts("train")] != [question(p) for p in other.prompts("train")]


def test_more_training_prompts_leave_the_held_out_ones_as_they_were():
    small, large = gym(), gym(size=80)
    assert [question(p) for p in small.prompts("held_out")] == [question(p) for p in large.prompts("held_out")]


def test_nothing_held_out_is_nothing():
    task = gym(held_out_size=0)
    assert task.prompts("held_out") == []
    assert len(task.prompts("train")) == 40


def test_the_generated_answer_is_the_right_one_and_is_rewarded_exactly():
    task = gym()
    for item in task.prompts("train")[:10]:
        left, right = question(item).removeprefix("Calculate ").removesuffix(".").split(" + ")
        total = int(left) + int(right)
        assert item.answer == str(total)
        assert task.reward(item, str(total)) == 1.0
        assert task.reward(item, f" {total}\n") == 1.0
        assert task.reward(item, str(total + 1)) == 0.0
        assert task.reward(item, "") == 0.0


def test_an_exhausted_generator_says_how_many_questions_it_has():
    task = gym(params=ADDITION | {"min_digits": 1, "max_digits": 1}, size=200)
    with pytest.raises(DataError) as caught:
        task.prompts("train")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("tasks.sums: reasoning-gym 'basic_arithmetic' gave ")
    assert "expected 215 (size + held_out_size); lower them or widen params" in message


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(DataError) as caught:
        gym(dataset="basic_aritmetic")
    assert str(caught.value) == (
        "tasks.sums.dataset = 'basic_aritmetic' is no reasoning-gym data set; did you mean 'basic_arithmetic'?"
    )


@pytest.mark.parametrize("params", [{"digits": 2}, {"min_terms": -1}, {"min_terms": 5, "max_terms": 2}, {"size": 3}])
def test_parameters_that_the_generator_refuses_are_one_line(params):
    with pytest.raises(DataError) as caught:
        gym(params=params)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("tasks.sums.params: reasoning-gym 'basic_arithmetic' refuses them: ")
    assert not message.endswith(": ")


def test_every_task_of_a_recipe_is_made_under_its_name(tmp_path):
    made = make_tasks(
        {
            "words": FileTask(type="file", path=write_prompts(tmp_path / "a.jsonl"), teacher="t"),
            "sums": ReasoningGymTask(type="reasoning_gym", dataset="basic_arithmetic", teacher="t", params=ADDITION),
        }
    )
    assert isinstance(made["words"], PromptFile)
    assert isinstance(made["sums"], ReasoningGym)
    assert [task.name for task in made.values()] == ["words", "sums"]
