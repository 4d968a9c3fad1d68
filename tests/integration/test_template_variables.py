"""Variables of chat templates, and templates that refuse tools or system messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import prompt, toy_model, toy_recipe
from servers import serving
from templated import NO_SYSTEM, TERSE, ending, save_cross_tokenizer, save_templated, templated
from zoo import toy_bpe

import opd
from opd.config import RemoteConfig, SftConfig
from opd.config.parse import apply_overrides
from opd.errors import ConfigError, DataError, ModelError
from opd.local.build import build, build_student
from opd.logging.run_folder import read_rollouts
from opd.records import Prompt
from opd.remote.client import Client, Endpoint
from opd.remote.teacher import compare_templates, connect
from opd.score_cache import identities
from opd.text.chat import Chat
from opd.text.template import set_variables, variables_of

PLAIN = ending("<|im_end|>\n")
THINKING = PLAIN + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
STYLED = "{% generation %}{% endgeneration %}{{ style | default('plain') }}: " + PLAIN
NO_TOOLS = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + PLAIN
SAMPLED = {"objective": {"type": "immediate"}}


def recipe(folder: Path, student: Any, teacher: Any, **changes: Any) -> dict[str, Any]:
    """Own models for the student and for its two teachers, given their chat templates or folders."""
    ours = student if Path(student).is_dir() else save_templated(folder / "mine", templated(student))
    theirs = teacher if Path(teacher).is_dir() else save_templated(folder / "theirs", templated(teacher), 1)
    teachers = {name: {"model": theirs} for name in ("even", "odd")}
    own = changes.pop("template_args", None)
    if own is not None:
        teachers["even"]["template_args"] = own
    return toy_recipe(folder, student=ours, teachers=teachers, **changes)


def first_prompt(run: Path) -> str:
    """What the student read of a run's first prompt."""
    [first, *_] = read_rollouts(run)
    start = int(first.rollout.loss_mask.argmax())
    return templated(None).decode(first.rollout.token_ids[:start])


@pytest.mark.parametrize(("given", "written"), [(False, True), (True, False), (None, False)])
def test_a_variable_reaches_the_students_template_in_training_and_evaluation(tmp_path: Path, given: Any, written: bool):
    chat = {} if given is None else {"chat": {"template_args": {"enable_thinking": given}}}
    opd.train(recipe(tmp_path, THINKING, THINKING, steps=2, **SAMPLED, **chat))
    assert first_prompt(tmp_path / "run").endswith("assistant\n<think>\n\n</think>\n\n") is written
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["chat"]["template_args"] == ({} if given is None else {"enable_thinking": given})
    rows = opd.Trainer(tmp_path / "run").evaluate()
    assert rows


def test_a_teacher_reads_the_students_variables_unless_it_has_its_own(tmp_path: Path):
    chat = {"chat": {"template_args": {"style": "brief"}}}
    backend = build(opd.parse_config(recipe(tmp_path, STYLED, STYLED, **SAMPLED, **chat)))
    assert {variables_of(p.network.tokenizer)["style"] for p in backend.policies.values()} == {"brief"}
    assert all(p.prompts is None for p in backend.policies.values())
    own = recipe(tmp_path, STYLED, STYLED, template_args={"style": "long"}, **SAMPLED, **chat)
    backend = build(opd.parse_config(own))
    even, odd = backend.policies["even"], backend.policies["odd"]
    assert odd.prompts is None
    assert even.prompts is not None
    rendered = even.network.tokenizer.decode(Chat(even.network.tokenizer).encode_prompt(prompt()))
    assert rendered.startswith("long: ")
    apart = backend.facts().templates
    assert list(apart) == ["even"]
    assert apart["even"].teacher.startswith("long: ")
    assert apart["even"].student.startswith("brief: ")


def test_one_model_is_student_and_teacher_with_two_sets_of_variables(tmp_path: Path):
    model = save_templated(tmp_path / "mine", templated(STYLED))
    config = opd.parse_config(recipe(tmp_path, model, model, template_args={"style": "long"}, **SAMPLED))
    backend = build(config)
    assert variables_of(backend.tokenizer) == {}
    assert backend.policies["odd"].network is backend.student.network
    assert backend.policies["even"].prompts is not None
    items = backend.sampler().sample([prompt(teacher="even"), prompt(teacher="odd")], num_samples=1, seed=(1,))
    scored = backend.teachers(keep_hidden=False).score(items)
    own, same = (
        s.score.logprobs[s.rollout.loss_mask] - s.rollout.rollout_logprobs[s.rollout.loss_mask] for s in scored
    )
    assert abs(same).max() < 1e-4  # the student's own distribution
    assert abs(own).max() > 1e-3


def test_variables_are_part_of_what_a_kept_score_depends_on(tmp_path: Path):
    for name, theirs in {
        "own prompts": save_templated(tmp_path / "own", templated("{{ style }}" + TERSE)),
        "another tokenizer": save_cross_tokenizer(tmp_path / "foreign", toy_bpe(300, template=STYLED)),
    }.items():
        ids = []
        for style in ("a", "a", "b"):
            config = opd.parse_config(recipe(tmp_path, PLAIN, theirs, template_args={"style": style}, **SAMPLED))
            ids.append(identities(config, build(config))["even"])
        assert ids[0] == ids[1], name
        assert ids[0] != ids[2], name


def test_fine_tuning_reads_the_variables(tmp_path: Path):
    source = save_templated(tmp_path / "mine", templated(STYLED))
    tasks = {"answers": {"type": "file", "path": str(tmp_path / "x"), "teacher": "-"}}
    tree: dict[str, Any] = {"student": source, "output": str(tmp_path / "out"), "tasks": tasks}
    tokenizer = build_student(SftConfig(**tree | {"chat": {"template_args": {"style": "brief"}}})).network.tokenizer
    assert tokenizer.decode(Chat(tokenizer).encode_prompt(prompt())).startswith("brief: ")


@pytest.mark.parametrize(
    ("template", "given", "line"),
    [
        (
            THINKING,
            {"enable_thinkin": False},
            "chat.template_args.enable_thinkin has no effect, because the chat template of .* does not read it; the template's "
            "variables: enable_thinking; remove the key",
        ),
        (THINKING, {"messages": "x"}, "chat.template_args.messages: opd itself gives 'messages' to chat templates"),
        (
            None,
            {"style": "x"},
            "chat.template_args.style has no effect, because the chat template of .* does not exist",
        ),
        (PLAIN, {"m": "x"}, "does not read it; the template's variables: none"),  # which the template sets itself
    ],
)
def test_a_variable_without_effect_is_refused(tmp_path: Path, template: str | None, given: Any, line: str):
    student = save_templated(tmp_path / "mine", templated(template))
    tree = recipe(tmp_path, student, PLAIN, chat={"template_args": given}, **SAMPLED)
    with pytest.raises(ModelError, match=line):
        opd.Trainer(tree).check()


def test_a_variable_that_the_teachers_template_does_not_read_is_refused_where_it_was_given_to_the_teacher(
    tmp_path: Path,
):
    tree = recipe(tmp_path, STYLED, TERSE, chat={"template_args": {"style": "brief"}}, **SAMPLED)
    assert all(f.passed for f in opd.Trainer(tree).check())
    tree = recipe(tmp_path, STYLED, TERSE, template_args={"style": "long"}, **SAMPLED)
    with pytest.raises(ModelError, match=r"teachers\.even\.template_args\.style has no effect"):
        opd.Trainer(tree).check()


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        ({"adapter": "x"}, "an adapter has the student's template"),
        ({"weights": {"a": 1, "b": 1}}, "weights names other teachers"),
        ({"url": "http://localhost:1"}, "this teacher reads the student's prompts"),
        ({"model": "x", "template": "student"}, "this teacher reads the student's prompts"),
    ],
)
def test_variables_of_a_teacher_that_has_no_prompts_of_its_own_are_refused(tmp_path: Path, teacher: Any, why: str):
    tree = toy_recipe(tmp_path)
    tree["teachers"] = {"even": teacher | {"template_args": {"style": "x"}}, "odd": {"model": "y"}}
    with pytest.raises(ConfigError, match=f"template_args has no effect: {why}; remove template_args"):
        opd.parse_config(tree)


def test_variables_stand_on_the_command_line_and_cannot_change_on_resume(tmp_path: Path):
    tree = recipe(tmp_path, THINKING, THINKING, steps=1, **SAMPLED)
    apply_overrides(tree, ["chat.template_args.enable_thinking=false"])
    config = opd.parse_config(tree)
    assert config.chat.template_args == {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"chat\.template_args\.enable_thinking"):
        opd.parse_config(tree | {"enable_thinking": False})
    opd.train(config)
    with pytest.raises(ConfigError, match=r"chat\.template_args"):
        opd.Trainer(tmp_path / "run").resume(["steps=2", "chat.template_args.enable_thinking=true"])


def test_a_server_is_compared_with_the_students_variables():
    client = Client(RemoteConfig(timeout_s=60.0, attempts=2, first_wait_s=0.01, longest_wait_s=0.05))
    try:
        with serving(toy_model(7)) as server:
            server.tokenizer.chat_template = STYLED
            ours = templated(STYLED, added=None)
            set_variables(ours, {"style": "brief"})
            teacher = connect("t", Endpoint("teacher 't'", (server.url,)), client, ours)
            assert compare_templates(teacher, ours, own=True).template is None
            server.tokenizer.chat_template = STYLED.replace("style", "manner")
            with pytest.raises(ModelError, match=r"renders a question as 'plain: .*, the student's as 'brief: "):
                compare_templates(teacher, ours, own=True)
    finally:
        client.close()


# --- what a template refuses ---


def test_what_a_template_refuses_is_refused_only_where_a_prompt_has_it(tmp_path: Path):
    question, tools = {"role": "user", "content": "hi"}, ({"type": "function", "function": {"name": "f"}},)
    system = {"role": "system", "content": "x"}
    for template, messages, given, what in (
        (NO_TOOLS, (question,), tools, "its tools: no tools here"),
        (NO_SYSTEM, (system, question), (), "its system message: no system message here"),
        (NO_SYSTEM, (question,), tools, "its tools: no system message here"),  # which would show the tools
        ("{{ raise_exception('nothing here') }}", (question,), (), "it: nothing here"),
    ):
        chat = Chat(templated(template))
        chat.tokenizer.name_or_path = "some/model"
        with pytest.raises(DataError) as caught:
            chat.encode_prompt(Prompt("p", messages, teacher="t", task="", tools=given))
        assert str(caught.value) == f"prompt 'p': the chat template of 'some/model' refuses {what}"
        if template in (NO_TOOLS, NO_SYSTEM):
            assert chat.encode_prompt(Prompt("p", (question,), teacher="t", task=""))


@pytest.mark.parametrize("who", ["student", "teacher", "another tokenizer"])
@pytest.mark.parametrize("template", [NO_TOOLS, NO_SYSTEM], ids=["tools", "system"])
def test_a_model_whose_template_refuses_tools_or_system_messages_trains_on_other_prompts(
    tmp_path: Path, template: str, who: str
):
    student, teacher = (template, PLAIN) if who == "student" else (PLAIN, template)
    if who == "another tokenizer":
        teacher = save_cross_tokenizer(tmp_path / "foreign", toy_bpe(300, template=template))
    tree = recipe(tmp_path, student, teacher, steps=1, **SAMPLED)
    assert all(f.passed for f in opd.Trainer(tree).check())
    assert opd.train(tree).finished
