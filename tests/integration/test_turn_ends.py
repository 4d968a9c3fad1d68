"""A turn ends where the model's chat template ends it: in sampling, scoring, fine-tuning and warm-up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import prompt, sft_recipe, toy_recipe
from templated import OPENED, TURN_END, ending, save_templated, templated

import opd
from opd.config import EpisodesConfig, SftConfig
from opd.episodes.player import Demonstrator, EpisodePlayer, one_turn
from opd.errors import ModelError
from opd.local import warmup
from opd.local.build import build, build_student
from opd.local.sampler import episode_player
from opd.logging.run_folder import read_rollouts
from opd.records import Prompt
from opd.text.chat import Chat, Conversation
from opd.text.student_text import StudentSide
from opd.text.template import turn_end

EOS = 257


def recipe(folder: Path, student: str, teacher: str | None = None, **changes: Any) -> dict[str, Any]:
    """A recipe whose teachers are one model, the student's own weights by default."""
    teachers = {name: {"model": teacher or student} for name in ("even", "odd")}
    return toy_recipe(folder, student=student, teachers=teachers, **changes)


def declaring(*ids: int) -> Any:
    """A generation config with these end tokens."""
    return SimpleNamespace(eos_token_id=list(ids) if len(ids) != 1 else ids[0])


KINDS: dict[str, tuple[Any, Any, tuple[int, ...], int, bool]] = {
    # tokenizer, generation config, ids that end a turn, the one that is taught, whether somebody disagrees
    "all agree": (templated(ending("<|im_end|>\n")), declaring(EOS), (EOS,), EOS, False),
    "template alone": (templated(ending("<|turn_end|>\n")), declaring(EOS), (EOS, TURN_END), TURN_END, True),
    "no generation config": (templated(ending("<|turn_end|>")), None, (EOS, TURN_END), TURN_END, True),
    "in a list of the generation config": (
        templated(ending("<|turn_end|>\n")),
        declaring(EOS, TURN_END, 260),
        (EOS, TURN_END, 260),
        TURN_END,
        True,
    ),
    "several tokens": (templated(ending("<|turn_end|><|im_end|>\n")), None, (EOS, TURN_END), TURN_END, True),
    "white space before it": (templated(ending(" \n<|turn_end|>\n")), None, (EOS, TURN_END), TURN_END, True),
    "a variable": (templated(ending("{{ eos_token }}\n")), declaring(EOS), (EOS,), EOS, False),
    "an added token that is not special": (
        templated(ending("<|turn_end|>\n"), special=False),
        None,
        (EOS, TURN_END),
        TURN_END,
        True,
    ),
    "a template that writes none": (templated(ending("\n")), declaring(EOS), (EOS,), EOS, False),
    "where a further message follows": (
        templated(ending("{% if not loop.last or add_generation_prompt %}<|turn_end|>\n{% endif %}")),
        declaring(EOS),
        (EOS, TURN_END),
        TURN_END,
        True,
    ),
    "before the message that follows": (
        templated(
            "{% for m in messages %}{{ '<|im_start|>' if loop.first else '<|turn_end|><|im_start|>' }}{{ m.role }}\n{{ m.content }}"
            "{% endfor %}{% if add_generation_prompt %}<|turn_end|><|im_start|>assistant\n{% endif %}"
        ),
        None,
        (EOS, TURN_END),
        TURN_END,
        True,
    ),
    "a question's own opening is none": (
        templated(
            "{% for m in messages %}{{ '<|turn_end|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}{% endfor %}"
        ),
        declaring(EOS),
        (EOS,),
        EOS,
        False,
    ),
    "no template": (templated(None), declaring(EOS), (EOS,), EOS, False),
    "tokenizer and generation config alone": (templated(None), declaring(TURN_END), (EOS, TURN_END), EOS, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_ends_with_the_token_of_the_template_and_with_those_that_are_declared(kind: str):
    tokenizer, config, ids, taught, disagrees = KINDS[kind]
    end = turn_end(tokenizer, config, who="m")
    assert (end.ids, end.written) == (ids, taught)
    assert bool(end.note) == disagrees
    if disagrees:
        assert "'<|im_end|>' (id 257)" in end.note
        assert "'<|turn_end|>' (id 258)" in end.note


def test_a_tokenizer_without_an_end_token_has_its_templates():
    tokenizer = templated(ending("<|turn_end|>\n"))
    tokenizer.eos_token = None
    assert turn_end(tokenizer, who="m").ids == (TURN_END,)
    tokenizer.chat_template = None
    with pytest.raises(
        ModelError, match=r"^m: neither its chat template, its tokenizer nor its generation config has an"
    ):
        turn_end(tokenizer, who="m")


@pytest.mark.parametrize("end", ["<|done|>\n", " END\n", "[/answer]"])
def test_a_template_that_ends_a_turn_with_text_is_refused_with_the_reason(end: str, tmp_path: Path):
    source = save_templated(tmp_path / "mine", templated(ending(end)))
    with pytest.raises(ModelError, match=r"ends a turn with .*, which holds no special or added token") as error:
        build(opd.parse_config(recipe(tmp_path, source))).sampler()
    assert repr(end.strip()) in str(error.value)
    assert "end token: '<|im_end|>'" in str(error.value)
    assert "add it to the tokenizer as one token" in str(error.value)


@pytest.mark.parametrize("special", [True, False])
def test_a_student_stops_at_its_templates_end_of_turn_and_its_text_does_not_hold_it(tmp_path: Path, special: bool):
    tokenizer = templated(ending("<|turn_end|>\n"), special=special)
    source = save_templated(tmp_path / "mine", tokenizer)
    backend = build(opd.parse_config(recipe(tmp_path, source, sampling={"max_new_tokens": 150})))
    rollouts = backend.sampler().sample([prompt(f"p{i}", "hi") for i in range(40)], num_samples=1, seed=(1,))
    ended = [r for r in rollouts if r.finish == "end"]
    assert any(r.token_ids[-1] == TURN_END for r in ended)
    for rollout in rollouts:
        said = rollout.token_ids[rollout.loss_mask].tolist()
        assert not {EOS, TURN_END} & set(said[:-1])
        assert (rollout.finish == "end") == (said[-1] in (EOS, TURN_END))
        assert "<|turn_end|>" not in rollout.response


def test_fine_tuning_and_demonstrations_teach_the_end_of_the_template(tmp_path: Path):
    source = save_templated(tmp_path / "mine", templated(ending("<|turn_end|>\n")))
    student = build_student(SftConfig(**sft_recipe(tmp_path, source)))
    player = episode_player(student.network, EpisodesConfig(), one_turn)
    take = Demonstrator(player.chat, lambda p, m: "yes").take_turns
    [rollout] = player.play([(prompt(), 0)], take, version=0)
    yes = student.network.tokenizer("yes", add_special_tokens=False).input_ids
    assert rollout.token_ids[rollout.loss_mask].tolist() == [*yes, TURN_END]
    assert rollout.finish == "end"
    assert rollout.response == "yes"


def test_a_fine_tuned_student_ends_its_turn_as_its_template_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = save_templated(tmp_path / "mine", templated(ending("<|turn_end|>\n")))
    config = SftConfig(**sft_recipe(tmp_path, source, steps=40))
    opd.sft(config)
    said = capsys.readouterr().out
    assert said.count("'<|turn_end|>' (id 258)") == 2  # what the template writes, and what is taught
    assert said.count(f"where a turn of '{source}' ends") == 1
    adapter = tmp_path / "expert" / "student"
    lora = {"rank": 4, "alpha": 8, "start": str(adapter)}
    backend = build(opd.parse_config(recipe(tmp_path / "run", source, lora=lora)))
    asked = [prompt(f"p{i}", f"say {c}") for i, c in enumerate("abcdefgh")]
    rollouts = backend.sampler().sample(asked, num_samples=1, seed=(0,))
    assert sum(r.finish == "end" and r.token_ids[-1] == TURN_END for r in rollouts) >= 6


def test_a_warm_up_shows_the_student_the_end_of_its_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    student = save_templated(tmp_path / "mine", templated(ending("<|turn_end|>\n")))
    teacher = save_templated(tmp_path / "theirs", templated(ending("<|im_end|>\n")), 1)
    changes = {"warmup": {"steps": 2}, "sampling": {"max_new_tokens": 150}, "objective": {"type": "immediate"}}
    backend = build(opd.parse_config(recipe(tmp_path, student, teacher, **changes)))
    learnt: list[Any] = []
    real = warmup.imitation_batch
    monkeypatch.setattr(warmup, "imitation_batch", lambda rollouts: learnt.extend(rollouts) or real(rollouts))
    warmup.warm_up(backend, {"first": [prompt(f"p{i}", "hi", teacher="even") for i in range(12)]}, lambda line: None)
    assert learnt
    assert {int(r.token_ids[-1]) for r in learnt} == {TURN_END}


def test_a_run_says_once_where_template_and_tokenizer_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = save_templated(tmp_path / "mine", templated(ending("<|turn_end|>\n")))
    opd.train(opd.parse_config(recipe(tmp_path, source, steps=2)))
    said = capsys.readouterr().out
    assert said.count("warning: where a turn of") == 1
    assert "'<|turn_end|>' (id 258), the tokenizer's end token is '<|im_end|>' (id 257)" in said
    ends = {int(s.rollout.token_ids[-1]) for s in read_rollouts(tmp_path / "run") if s.rollout.finish == "end"}
    assert ends <= {EOS, TURN_END}


def test_a_run_whose_template_and_tokenizer_agree_says_nothing_of_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    opd.train(opd.parse_config(toy_recipe(tmp_path, steps=2)))
    assert "where a turn of" not in capsys.readouterr().out


def test_a_teacher_of_another_tokenizer_is_asked_for_its_end_where_the_student_ends_by_its_template():
    student_side = StudentSide(templated(ending("<|turn_end|>\n")))
    assert student_side.end_ids == (EOS, TURN_END)
    assert student_side.end_id == TURN_END


def test_a_conversation_goes_on_behind_the_templates_end_of_turn_without_a_second_one():
    tokenizer = templated(ending("<|turn_end|>\n"))
    conversation = Conversation(Chat(tokenizer), prompt())
    ids = [*tokenizer("yes", add_special_tokens=False).input_ids, TURN_END]
    assert conversation.answer(ids, [-1.0] * len(ids), frozenset({EOS, TURN_END}))["content"] == "yes"
    conversation.observe([{"role": "user", "content": "more"}])
    assert len(conversation.stretches) == 1
    assert conversation.token_ids.count(TURN_END) == 3  # behind the question, the answer and the next question


def test_a_prompts_calls_are_written_by_a_template_that_ends_them_with_another_token():
    """A turn with calls ends with a token that only the generation config names, as Llama's <|eom_id|> does."""
    tokenizer = templated(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|turn_end|>\n{% else %}<|done|>\n{% endif %}"
        "{% endfor %}" + OPENED
    )
    tokenizer.add_tokens(["<|done|>"], special_tokens=True)
    call = {"id": "000000000", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": (call,)})
    messages = (*messages, {"role": "user", "content": "and?"})
    asked = Prompt("p", messages, teacher="t", task="task")
    assert '"name": "add"' in tokenizer.decode(
        Chat(tokenizer).encode_prompt(asked)
    )  # nothing says that the turn ends there
    chat = Chat(tokenizer, generation_config=declaring(TURN_END))
    assert 'assistant\nadd({"a": 1})<|turn_end|>\n' in tokenizer.decode(chat.encode_prompt(asked))


def test_a_demonstration_ends_with_what_the_generation_config_alone_declares():
    tokenizer = templated(ending("\n"))
    tokenizer.eos_token = None
    chat = Chat(tokenizer, generation_config=declaring(TURN_END))
    player = EpisodePlayer(chat, EpisodesConfig(), end_ids=chat.end.ids, make_environment=one_turn)
    [found] = player.play([(prompt(), 0)], Demonstrator(chat, lambda p, m: "yes").take_turns, version=0)
    assert (found.token_ids[-1], found.finish) == (TURN_END, "end")
