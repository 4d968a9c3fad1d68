"""Records of prompt files in the spellings that are in use, and those that are refused, each with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from call_turns import BY_KEY, FENCED, LISTED, SINGLE, TAGGED, chatml
from factories import byte_tokenizer, prompt

from opd.config import EpisodesConfig, FileTask
from opd.data.conversations import check_prompt
from opd.data.prompts import Completion, read_prompts
from opd.data.tasks import PromptFile, read_splits
from opd.episodes.player import EpisodePlayer
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.text.chat import Chat
from opd.text.teacher_text import TeacherSide

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def read(folder: Path, *records: Any, completion: Completion | None = None) -> list[Prompt]:
    path = folder / "prompts.jsonl"
    lines = [r if isinstance(r, str) else json.dumps({"id": str(i), **r}) for i, r in enumerate(records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_prompts(path, task="words", teacher="t", completion=completion)


def refused(folder: Path, *records: Any, completion: Completion | None = None, line: int | None = 1) -> str:
    """What a file is refused for, without its place, which is the last line's by default."""
    with pytest.raises(DataError) as caught:
        read(folder, *records, completion=completion)
    message = str(caught.value)
    assert "\n" not in message
    place = f"{folder / 'prompts.jsonl'}" + (f", line {line}" if line else "")
    assert message.startswith(f"{place}: "), message
    return message.removeprefix(f"{place}: ")


def plain(messages: Any) -> list[dict[str, Any]]:
    return [dict(m) for m in messages]


# --- conversations that are no prompts ---


def test_a_record_that_ends_with_the_answer_is_refused_with_the_remedy(tmp_path):
    message = refused(tmp_path, {"messages": [USER, ANSWER]})
    assert "the last message is the assistant's" in message
    assert "tasks.words.completion = 'drop'" in message


def test_the_last_answer_is_cut_off_and_used_as_the_recipe_asks(tmp_path):
    record = {"messages": [SYSTEM, USER, ANSWER]}
    dropped, answered, shown = (read(tmp_path, record, completion=c)[0] for c in ("drop", "answer", "demonstration"))
    assert plain(dropped.messages) == plain(answered.messages) == plain(shown.messages) == [SYSTEM, USER]
    assert (dropped.answer, dropped.demonstration) == (None, ())
    assert (answered.answer, answered.demonstration) == ("4", ())
    assert (shown.answer, plain(shown.demonstration)) == (None, [ANSWER])


def test_only_the_last_of_several_answers_is_cut_off(tmp_path):
    [found] = read(tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]}, completion="drop")
    assert plain(found.messages) == [USER, ANSWER, USER]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM], "there is no user message to answer, only a message of the system"),
        ([ANSWER], "there is no user message to answer, only a message of the assistant"),
        ([SYSTEM, ANSWER], "the last message is the assistant's"),
        ([SYSTEM, SYSTEM, USER], "message 2 is a system message, which is allowed once, at the beginning"),
        ([USER, SYSTEM], "message 2 is a system message, which is allowed once, at the beginning"),
        (
            [USER, {"role": "tool", "content": "3"}],
            "message 2 has the role 'tool', and no call of the assistant comes before it",
        ),
        (
            [{"role": "tool", "content": "3"}],
            "message 1 has the role 'tool', and no call of the assistant comes before it",
        ),
        ([USER, ANSWER, ANSWER, USER], "messages 2 and 3 are both the assistant's"),
        ([USER, {"role": "assistant", "content": ""}, USER], "message 2, the assistant's, is empty"),
        ([{"role": "system", "content": ""}, USER], "message 1, the system's, is empty"),
        ([USER, ANSWER, {"role": "user", "content": " \n"}], "message 3, the user's, is empty"),
        ([{"role": "developer", "content": "x"}, USER], "messages[0] needs 'role'"),
        ([USER | {"weight": 0}], "messages[0] has the key 'weight', which no model is shown"),
    ],
)
def test_a_conversation_that_nobody_can_answer_is_refused(tmp_path, messages, reason):
    assert refused(tmp_path, {"messages": messages}).startswith(reason)


def test_prompts_that_python_makes_obey_the_same_rules():
    check_prompt(prompt(), "here")
    bad = [
        Prompt("p", (SYSTEM,), teacher="t", task="task"),
        Prompt("p", (USER, ANSWER), teacher="t", task="task"),
        Prompt("p", (), teacher="t", task="task"),
        Prompt("p", ({"role": "user", "content": None},), teacher="t", task="task"),
        Prompt("p\n", (USER,), teacher="t", task="task"),
        Prompt("p", (USER,), teacher="t\ud800", task="task"),
        Prompt("p", (USER,), teacher="t", task="task", answer="\udfff"),
        Prompt("p", (USER,), teacher="t", task="task", meta={"entry": {"k": ["\ud800"]}}),
        Prompt("p", (USER,), teacher="t", task="task", demonstration=(USER,)),
    ]
    for item in bad:
        with pytest.raises(DataError, match=r"^here: "):
            check_prompt(item, "here")


def test_every_task_is_held_to_them_in_both_splits():
    class Own:
        name = "own"

        def prompts(self, split: str) -> list[Prompt]:
            return [prompt()] if split == "train" else [Prompt("h", (USER, ANSWER), teacher="t", task="own")]

    with pytest.raises(DataError, match=r"^prompt 'h': the last message is the assistant's"):
        read_splits({"own": Own()})  # type: ignore[dict-item]


def test_an_environment_that_opens_in_an_impossible_order_fails_its_episode():
    class Opens:
        async def reset(self) -> list[Message]:
            return [{"role": "tool", "content": "3"}]

        async def step(self, message: Message) -> Any: ...

    chat = Chat(byte_tokenizer())
    ends = [chat.tokenizer.eos_token_id]
    player = EpisodePlayer(chat, EpisodesConfig(), end_ids=ends, make_environment=lambda p: Opens())
    [found] = player.play([(prompt(), 0)], lambda episodes: [], version=0)
    assert "message 2 has the role 'tool', and no call of the assistant comes before it" in str(found.failure)


# --- text that is no text ---


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"prompt": "say \ud800"}, "'prompt' contains a lone surrogate ('\\ud800', half of a character) at position 5"),
        ({"prompt": "x", "answer": "\udfff"}, "'answer' contains a lone surrogate"),
        ({"prompt": "x", "id": "a\ud800"}, "'id' contains a lone surrogate"),
        ({"prompt": "x", "teacher": "a\ud800"}, "'teacher' contains a lone surrogate"),
        ({"prompt": "x", "source": "a\ud800"}, "'source' contains a lone surrogate"),
        ({"prompt": "x", "meta": {"a": [{"b": "\ud800"}]}}, "'meta'.a[0].b contains a lone surrogate"),
        ({"prompt": "x", "meta": {"a\ud800": 1}}, "a key of 'meta' contains a lone surrogate"),
        ({"prompt": "x", "so\udc00urce": 1}, "a key contains a lone surrogate"),
        ({"prompt": "x", "tools": [{"function": {"name": "\ud800"}}]}, "'tools'[0].function.name contains a lone"),
        ({"prompt": "x", "completion": "\ud800"}, "'completion' contains a lone surrogate"),
        ({"prompt": "x", "demonstration": [{"role": "assistant", "content": "\ud800"}]}, "'demonstration'[0].content contains"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "'messages'[0].content contains a lone surrogate"),
        ({"messages": [{"role": "us\ud800er", "content": "a"}]}, "'messages'[0].role contains a lone surrogate"),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, "'conversations'[0].value contains a lone surrogate"),
        ({"prompt": "a\0b"}, "'prompt' contains the character U+0000 at position 2"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": "\\ud800"}'}]}, USER]},
            "messages[1]: an argument of the call of 'f'.x contains a lone",
        ),
    ],
)  # fmt: skip
def test_half_a_character_in_any_field_is_refused_by_line(tmp_path, record, name):
    assert refused(tmp_path, {"prompt": "good"}, record, line=2).startswith(name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x", "answer": NaN}', "not valid JSON: NaN is no JSON number"),
        ('{"prompt": "x", "meta": {"a": -Infinity}}', "not valid JSON: -Infinity is no JSON number"),
        ('{"prompt": "x", "answer": 1e999}', "number 1e999 is too large"),
        ('{"prompt": "x", "prompt": "y"}', "key 'prompt' occurs twice; keep one"),
        ('{"prompt": "x", "meta": {"a": 1, "a": 2}}', "key 'a' occurs twice; keep one"),
        ('{"prompt": "x\x01"}', "not valid JSON"),
        ('{"id": "a b\\u2028", "prompt": "x"}', "the id 'words:a b\\u2028' has characters that cannot be printed"),
        ('{"id": "a", "prompt": "x", "meta": {"a": ' + "[" * 900 + "]" * 900 + "}}", "'meta'.a[0][0][0]"),
    ],
)
def test_json_that_is_read_only_by_some_is_refused_by_line(tmp_path, line, reason):
    assert refused(tmp_path, line).startswith(reason)


def test_a_byte_order_mark_is_read_past(tmp_path):
    path = tmp_path / "p.jsonl"
    line = json.dumps({"id": "a", "prompt": "x", "teacher": "t"})
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\xef\xbb\xbf" + line.replace('"a"', '"b"').encode())
    assert [p.id for p in read_prompts(path, task="words")] == ["words:a", "words:b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{\n "prompt": "x"\n}', ", line 1: the object does not end on its line; write one record a line"),
        (b"\x1f\x8b\x08\x00", "' is compressed (gzip); unpack it with gunzip (tasks.words.path)"),
        ('{"prompt": "x"}'.encode("utf-16"), "' is UTF-16; save it as UTF-8"),
    ],
)
def test_a_file_of_another_format_is_named_with_the_remedy(tmp_path, content, reason):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(path, task="words", teacher="t")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_held_out_file_is_named_by_its_own_key(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x"}))
    config = FileTask(type="file", path=str(tmp_path / "a.jsonl"), held_out_path=str(tmp_path / "b.jsonl"), teacher="t")
    with pytest.raises(DataError, match=r"does not exist \(tasks.words.held_out_path\)"):
        PromptFile("words", config).prompts("held_out")


# --- spellings ---


def test_an_id_is_made_from_the_content(tmp_path):
    one, two, again = read(tmp_path, '{"prompt": "no id"}', '{"prompt": "other"}', '{"prompt": "no id"}')
    assert len({one.id, two.id, again.id}) == 3
    assert again.id == f"{one.id}-2"
    [same] = read(tmp_path, '{"prompt": "no id"}')
    assert same.id == one.id


def test_other_fields_are_kept_as_meta_and_ids_may_be_integers(tmp_path):
    [found] = read(tmp_path, {"id": 7, "prompt": "x", "source": "web", "metadata": {"a": 1}, "meta": {"level": 3}})
    assert found.id == "words:7"
    assert dict(found.meta) == {"source": "web", "metadata": {"a": 1}, "level": 3}
    assert refused(tmp_path, {"prompt": "x", "answr": "4"}).startswith("unknown key 'answr'; did you mean 'answer'?")
    assert refused(tmp_path, {"prompt": "x", "system": "Be brief."}).startswith("'system' is no key of a record")
    assert refused(tmp_path, {"prompt": "x", "level": 1, "meta": {"level": 2}}).startswith("'level' is in the record")


@pytest.mark.parametrize("completion", [[ANSWER], "4"])
def test_a_prompt_and_a_completion_are_read(tmp_path, completion):
    record = {"prompt": [USER], "completion": completion}
    [shown] = read(tmp_path, record)
    assert (plain(shown.messages), plain(shown.demonstration), shown.answer) == ([USER], [ANSWER], None)
    [answered] = read(tmp_path, record, completion="answer")
    assert (plain(answered.messages), answered.demonstration, answered.answer) == ([USER], (), "4")


def test_conversations_of_sharegpt_are_read(tmp_path):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
    ]
    [found] = read(tmp_path, {"conversations": turns})
    assert (plain(found.messages), plain(found.demonstration)) == ([SYSTEM, USER], [ANSWER])
    [asked] = read(tmp_path, {"conversations": turns[:2]})
    assert (plain(asked.messages), asked.demonstration) == ([SYSTEM, USER], ())


def test_empty_columns_of_a_table_are_no_fields(tmp_path):
    nothing = dict.fromkeys(("answer", "meta", "tools", "teacher", "messages", "completion", "demonstration"))
    [found] = read(tmp_path, {"prompt": "x", **nothing})
    assert (found.answer, found.tools, found.demonstration) == (None, (), ())


@pytest.mark.parametrize(
    ("record", "completion", "reason"),
    [
        ({"prompt": "x", "answer": " "}, None, "'answer' is empty"),
        ({"messages": [USER, ANSWER], "answer": "4"}, "answer", "the record has an 'answer' and ends with"),
        ({"messages": [USER, ANSWER], "demonstration": [ANSWER]}, "demonstration", "the record has a 'demonstration'"),
        ({"prompt": [USER], "completion": [USER]}, None, "'demonstration' must begin and end with a message of role"),
        ({"prompt": [USER], "completion": []}, None, "'completion' must be a non-empty list"),
        (
            {"prompt": [USER], "completion": [ANSWER, USER, ANSWER]},
            "answer",
            "completion = 'answer' needs one assistant's",
        ),
        (
            {"prompt": [USER], "completion": [{"role": "assistant", "tool_calls": [CALL]}]},
            None,
            "'demonstration' has a call",
        ),
        ({"prompt": [USER, ANSWER], "completion": "4"}, "drop", "the last message is the assistant's"),
        ({"prompt": "x", "messages": [USER]}, None, "give exactly one of 'messages' and 'prompt'"),
    ],
)
def test_a_completion_that_cannot_be_used_is_refused(tmp_path, record, completion, reason):
    assert refused(tmp_path, record, completion=completion).startswith(reason)


def test_what_is_advised_for_a_call_at_the_end_works(tmp_path):
    record = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
    for completion in (None, "answer"):
        message = refused(tmp_path, record, completion=completion)
        assert "'drop'" in message
        assert "demonstration" not in message
    assert plain(read(tmp_path, record, completion="drop")[0].messages) == [USER]


def test_a_record_without_a_prompt_is_refused_with_the_keys_that_it_has(tmp_path):
    assert refused(tmp_path, {"question": "x", "answer": "4"}).endswith("the record has 'id', 'question', 'answer'")


@pytest.mark.parametrize("key", ["images", "video", "chat_template_kwargs"])
def test_what_a_model_would_be_shown_elsewhere_is_not_lost_in_meta(tmp_path, key):
    assert refused(tmp_path, {"prompt": "x", key: ["a"]}).startswith(f"'{key}' is no key of a record; ")
    assert read(tmp_path, {"prompt": "x", key: None})


def test_a_completion_key_that_no_record_needs_is_refused(tmp_path):
    assert "completion = 'drop' has no effect" in refused(tmp_path, {"prompt": "x"}, completion="drop", line=None)


def test_a_reference_that_its_verifier_cannot_read_is_refused_by_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "4"}\n{"prompt": "b", "answer": "The answer is 4"}\n')
    for verifier, reason in (("number", "is no number"), ("math", "is not understood, or only a part of it is")):
        config = FileTask.model_validate({"type": "file", "path": str(path), "teacher": "t", "verifier": verifier})
        with pytest.raises(DataError, match=f"p.jsonl, line 2: prompt .*: answer 'The answer is 4' {reason}"):
            PromptFile("sums", config).prompts("train")
    graded = FileTask(type="file", path=str(path), teacher="t", grader="number")
    with pytest.raises(DataError, match=r"line 2.*is no number"):
        PromptFile("sums", graded).prompts("train")


# --- calls in the history ---


def history(arguments: Any, **call: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": "f", "arguments": arguments}} | call
    said = {"role": "assistant", "content": None, "tool_calls": [made]}
    return {"messages": [USER, said, {"role": "tool", "content": "3"}, {"role": "user", "content": "and now?"}]}


@pytest.mark.parametrize("template", [TAGGED, SINGLE, LISTED, FENCED, BY_KEY])
def test_a_call_of_the_history_is_written_as_the_template_writes_calls(tmp_path, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chatml(template)
    call = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    given = json.dumps({"x": 1}, ensure_ascii=False) if template == FENCED else {"x": 1}
    said = {"role": "assistant", "content": "", "tool_calls": [call | {"function": {"name": "f", "arguments": given}}]}
    tool = {"role": "tool", "content": "3", "tool_call_id": "000000000", "name": "f"}
    told = [USER, said, tool, {"role": "user", "content": "and now?"}]
    expected = tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
    for arguments, more in (('{"x": 1}', {}), ({"x": 1}, {"id": "call_of_another_api_1"})):
        [found] = read(tmp_path, history(arguments, **more))
        assert tokenizer.decode(Chat(tokenizer).encode_prompt(found)) == expected
        assert TeacherSide(tokenizer, name="t").render(found.messages).text == expected


def test_a_template_that_writes_no_calls_is_given_their_text(tmp_path):
    tokenizer = byte_tokenizer()
    [found] = read(tmp_path, history('{"x": 1}'))
    expected = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert expected in tokenizer.decode(Chat(tokenizer).encode_prompt(found))
    assert expected in TeacherSide(tokenizer, name="t").render(found.messages).text


def test_a_special_token_in_a_call_stays_text(tmp_path):
    tokenizer = byte_tokenizer()
    [found] = read(tmp_path, history({"x": "<|im_end|>"}))
    ids = Chat(tokenizer).encode_prompt(found)
    assert ids.count(tokenizer.eos_token_id) == 4  # one a message


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"function": {"name": "f", "arguments": "{"}}, "messages[1]: arguments of the call of 'f': not valid JSON"),
        (
            {"function": {"name": "f", "arguments": "[1]"}},
            "messages[1]: arguments of the call of 'f' must be an object",
        ),
        ({"function": {"arguments": {}}}, "messages[1]: a call needs 'function' with 'name' and 'arguments'"),
        ("f(1)", "messages[1]: a call needs 'function'"),
    ],
)
def test_a_call_that_is_none_is_refused(tmp_path, call, reason):
    record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER]}
    assert refused(tmp_path, record).startswith(reason)
