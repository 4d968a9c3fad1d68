"""A teacher of the student's vocabulary that has another chat template reads the student's tokens behind its own prompt."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import prompt, rollout, toy_model, toy_recipe
from servers import serving
from templated import CHATTY, CLOCK, NO_SYSTEM, TEMPERATURE, TERSE, ending, own_templates, save_templated, templated

import opd
from opd.align import compare
from opd.checks.startup import run_checks
from opd.config import RemoteConfig
from opd.data.tasks import read_tasks
from opd.errors import ConfigError, ModelError
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.records import ChunkScore, FailedScore, HiddenScore, Prompt, Rollout, SampledScore, Turn
from opd.remote.client import Client, Endpoint
from opd.remote.teacher import compare_templates, connect
from opd.score_cache import identities
from opd.text.chat import Chat
from opd.text.teacher_prompt import OwnPrompt, different_renderings

IM_END = "<|im_end|>\n"


def backend_of(folder: Path, *args: Any, **changes: Any) -> LocalBackend:
    return build(opd.parse_config(own_templates(folder, *args, **changes)))


def sampled(backend: LocalBackend, count: int = 3) -> list[Rollout]:
    prompts = [prompt(f"p{i}", f"say {i}", teacher="even") for i in range(count)]
    return backend.sampler().sample(prompts, num_samples=2, seed=(3,))


@torch.no_grad()
def behind(backend: LocalBackend, shown: str, response: list[int]) -> torch.Tensor:
    """The teacher's log-probabilities before each token of a response behind a text, by its plain forward pass."""
    network = backend.policies["even"].network
    before = network.tokenizer(shown, add_special_tokens=False).input_ids
    logits = network.base(input_ids=torch.tensor([[*before, *response]])).logits[0].double() / TEMPERATURE
    return torch.log_softmax(logits, -1)[len(before) - 1 : -1]


def rendered(tokenizer: Any, item: Rollout) -> str:
    messages = [dict(m) for m in item.prompt.messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("kind", ["sampled", "states"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(TERSE, CHATTY), (CHATTY, TERSE), (ending(IM_END), NO_SYSTEM.replace("m.content", "m.content | upper")), (None, CHATTY)],
    ids=["terse, chatty", "chatty, terse", "one that shows no answer", "no template, chatty"],
)  # fmt: skip
def test_a_teacher_scores_the_students_tokens_behind_its_own_prompt(
    tmp_path: Path, student: str | None, teacher: str, kind: str
):
    backend = backend_of(tmp_path, student, teacher)
    items = sampled(backend)
    for item, scored in zip(items, backend.teachers(keep_hidden=kind == "states").score(items), strict=True):
        response = item.token_ids[item.loss_mask].tolist()
        own = behind(backend, rendered(backend.policies["even"].network.tokenizer, item), response)
        expected = own[torch.arange(len(response)), torch.tensor(response)].numpy()
        assert isinstance(scored.score, HiddenScore | SampledScore)
        np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], expected, atol=1e-4)
        if isinstance(scored.score, HiddenScore):
            [part] = scored.score.parts
            head = backend.policies["even"].network.head_weight()
            logits = torch.tensor(part.hidden) @ head.T / TEMPERATURE
            torch.testing.assert_close(torch.log_softmax(logits.double(), -1), own, atol=1e-4, rtol=0)
    assert not np.allclose(expected, behind_students(backend, items[-1]), atol=0.05)  # it makes a difference


def behind_students(backend: LocalBackend, item: Rollout) -> np.ndarray:
    """What the teacher says of the tokens behind the student's prompt."""
    response = item.token_ids[item.loss_mask].tolist()
    shown = backend.tokenizer.decode(item.token_ids[~item.loss_mask])
    return behind(backend, shown, response)[torch.arange(len(response)), torch.tensor(response)].numpy()


def test_a_teacher_is_scored_in_the_students_prompt_where_the_recipe_says_so_with_a_warning_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = opd.parse_config(own_templates(tmp_path, template="student", steps=2))
    backend = build(config)
    items = sampled(backend)
    for item, scored in zip(items, backend.teachers(keep_hidden=False).score(items), strict=True):
        assert isinstance(scored.score, SampledScore)
        np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], behind_students(backend, item), atol=1e-4)
    opd.train(config)
    said = capsys.readouterr().out
    assert said.count("warning: teacher 'even' reads the student's prompts") == 1
    assert r"'user: ?<|im_end|>\nassistant: '" in said
    assert r"'You talk with a person. Answer in full.\n### USER\n?<|im_end|>\n### ASSISTANT\n'" in said


def test_the_check_names_both_renderings_of_a_teacher_that_reads_its_own_prompts(tmp_path: Path):
    config = opd.parse_config(own_templates(tmp_path))
    task_data = read_tasks(config, None)
    [found] = [
        f for f in run_checks(config, build(config), task_data) if f.name == "teacher 'even' reads prompts of its own"
    ]
    assert found.passed
    assert not found.warning
    assert "'user: ?<|im_end|>\\nassistant: '" in found.detail
    assert "### ASSISTANT" in found.detail


@pytest.mark.parametrize(
    "other",
    [TERSE, TERSE + "{# a comment #}", TERSE.replace("m.role", "m['role']"), None],
    ids=["equal", "a comment", "written otherwise", "none"],
)
def test_a_template_that_renders_as_the_students_changes_nothing(tmp_path: Path, other: str | None):
    backend = backend_of(tmp_path, TERSE, other)
    items = sampled(backend)
    policy = backend.policies["even"]
    for item in items:
        [shown] = policy.inputs(item)
        assert shown.token_ids is item.token_ids
        assert shown.mask is item.loss_mask
    if other is not None:
        assert not backend.facts().templates


def test_an_adapter_on_the_students_base_shares_its_template(tmp_path: Path):
    from factories import save_adapter

    source = save_templated(tmp_path / "mine", templated(TERSE))
    adapter = save_adapter(tmp_path / "adapter", source)
    tree = toy_recipe(tmp_path, student=source, teachers={n: {"adapter": adapter} for n in ("even", "odd")})
    tree["teachers"] = {n: {"adapter": adapter} for n in ("even", "odd")}
    backend = build(opd.parse_config(tree))
    assert backend.policies["even"].prompts is None
    assert not backend.facts().templates
    tree["teachers"]["even"]["template"] = "student"
    with pytest.raises(ConfigError, match=r"teachers.even: template = 'student' has no effect: an adapter has"):
        opd.parse_config(tree)


def test_each_part_of_a_mixture_reads_its_own_prompt(tmp_path: Path):
    tree = own_templates(tmp_path)
    third = save_templated(tmp_path / "third", templated(TERSE), 2)
    tree["teachers"] = {
        "even": {"model": tree["teachers"]["even"]["model"]},
        "other": {"model": third},
        "odd": {"weights": {"even": 3.0, "other": 1.0}},
    }
    backend = build(opd.parse_config(tree))
    items = [replace(i, prompt=replace(i.prompt, teacher="odd")) for i in sampled(backend)]
    found = backend.teachers(keep_hidden=False).score(items)
    each = [
        backend.models_as_teachers([name]).score([replace(i, prompt=replace(i.prompt, teacher=name)) for i in items])
        for name in ("even", "other")
    ]
    for both, first, second in zip(found, *each, strict=True):
        np.testing.assert_allclose(
            both.score.logprobs, 0.75 * first.score.logprobs + 0.25 * second.score.logprobs, atol=1e-5
        )
    assert backend.policies["other"].prompts is None


def episode(tokenizer: Any) -> Rollout:
    """Two turns with an observation between them, as the student's template writes them."""
    first = Prompt(
        "p", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}), "even", "task"
    )
    said = [("assistant", "add 1 1"), ("tool", "2"), ("assistant", "It is 2.")]
    messages = (*first.messages, *({"role": role, "content": text} for role, text in said))
    end = tokenizer.eos_token

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    opened = tokenizer.apply_chat_template(
        [dict(m) for m in first.messages], tokenize=False, add_generation_prompt=True
    )
    parts = [
        ("prompt", ids(opened)),
        ("student", ids("add 1 1" + end)),
        ("observation", ids("\ntool: 2<|im_end|>\nassistant: ")),
        ("student", ids("It is 2." + end)),
    ]
    token_ids = [i for _, part in parts for i in part]
    turns, mask, place = [], [], 0
    for author, part in parts:
        turns.append(Turn(author, place, place + len(part)))
        mask += [author == "student"] * len(part)
        place += len(part)
    base = rollout(token_ids, len(parts[0][1]), prompt=first)
    return replace(base, turns=tuple(turns), loss_mask=np.array(mask), messages=messages)


def test_every_turn_of_an_episode_is_read_behind_the_teachers_own_rendering_of_what_came_before(tmp_path: Path):
    backend = backend_of(tmp_path)
    tokenizer = backend.policies["even"].network.tokenizer
    item = episode(backend.tokenizer)
    [scored] = backend.teachers(keep_hidden=True).score([item])
    expected, states = [], 0
    for turn, before in zip([t for t in item.turns if t.author == "student"], (2, 4), strict=True):
        shown = tokenizer.apply_chat_template(
            [dict(m) for m in item.messages[:before]], tokenize=False, add_generation_prompt=True
        )
        response = item.token_ids[turn.start : turn.end].tolist()
        own = behind(backend, shown, response)
        expected += own[torch.arange(len(response)), torch.tensor(response)].tolist()
        states += len(response)
    assert isinstance(scored.score, HiddenScore)
    np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], expected, atol=1e-4)
    assert scored.score.parts[0].hidden.shape[0] == states == item.num_actions


def test_a_training_run_with_another_template_learns_and_reaches_its_teacher(tmp_path: Path):
    config = opd.parse_config(own_templates(tmp_path, steps=3))
    result = opd.train(config)
    assert result.finished


def test_a_conversation_that_the_teachers_template_refuses_fails_by_itself_with_the_reason(tmp_path: Path):
    backend = backend_of(tmp_path, TERSE, NO_SYSTEM)
    good = prompt("good", "hi", teacher="even")
    bad = Prompt("bad", ({"role": "system", "content": "x"}, *good.messages), teacher="even", task="task")
    items = backend.sampler().sample([good, bad], num_samples=1, seed=(1,))
    found = backend.teachers(keep_hidden=True).score(items)
    assert isinstance(found[0].score, HiddenScore)
    assert found[1].score == FailedScore(
        "even",
        f"teacher 'even': prompt 'bad': the chat template of '{tmp_path / 'theirs'}' refuses its system message: no system "
        "message here",
    )


def test_a_reading_that_exceeds_the_teachers_context_fails_by_itself(tmp_path: Path):
    long = CHATTY.replace("Answer in full.", "Answer in full. " * 20)
    backend = backend_of(tmp_path, TERSE, long)
    [scored, *_] = backend.teachers(keep_hidden=False).score(sampled(backend))
    assert isinstance(scored.score, FailedScore)
    assert "tokens exceed the context of teacher 'even' (256)" in scored.score.reason


def test_a_teacher_without_a_generation_prompt_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"teacher 'even': its chat template has no generation prompt"):
        backend_of(tmp_path, TERSE, "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}")


def test_white_space_before_an_answer_stands_before_it_once():
    gapped = TERSE.replace("{% if add_generation_prompt %}assistant: ", "{% if add_generation_prompt %}assistant:")
    own = OwnPrompt(Chat(templated(gapped)), Chat(templated(CHATTY)), name="t")
    tokenizer = templated(CHATTY)
    for said in ("yes", " yes"):
        ids = tokenizer(said, add_special_tokens=False).input_ids
        item = rollout([256, *ids], 1, prompt=prompt(text="hi"))
        item = replace(item, messages=(*item.prompt.messages, {"role": "assistant", "content": said}))
        [shown] = own.read(item)
        assert tokenizer.decode(shown.token_ids) == "user: hi<|im_end|>\nassistant: yes"
        assert shown.token_ids[shown.mask].tolist() == ids


def test_a_thinking_block_is_open_for_the_teacher_where_it_is_open_for_the_student():
    plain = ending(IM_END)
    thinks = plain.replace("assistant\n", "assistant\n<think>\n")
    ids = templated(plain)("a thought</think>yes", add_special_tokens=False).input_ids

    def shown(student: str, teacher: str, said: str) -> str:
        item = rollout([256, *ids], 1, prompt=prompt(text="hi"))
        item = replace(item, messages=(*item.prompt.messages, {"role": "assistant", "content": said}))
        [found] = OwnPrompt(Chat(templated(teacher)), Chat(templated(student)), name="t").read(item)
        return templated(plain).decode(found.token_ids[~found.mask])

    other = "Talk.\n" + plain
    assert shown(thinks, other, "a thought</think>yes").endswith("assistant\n<think>\n")
    assert shown(other, thinks, "<think>a thought</think>yes").endswith("assistant\n")
    assert shown(other, thinks, "yes").endswith("assistant\n<think>\n")


def test_a_teacher_that_ends_turns_with_another_token_is_compared_by_text_and_one_objective_refused(tmp_path: Path):
    arguments = (tmp_path, ending("<|turn_end|>\n"), CHATTY)
    line = (
        r"ends a turn with '<\|im_end\|>'.*with '<\|turn_end\|>' \(teachers.even.template = 'student'.*needs its dist"
    )
    # the student's own tokenizer declares <|im_end|> too, which ends its turns as well: nothing to refuse
    backend = backend_of(*arguments)
    assert not backend.cross_tokenizer
    backend = None
    tree = own_templates(tmp_path / "apart", CHATTY, ending("<|turn_end|>\n"))
    line = (
        line.replace(r"'<\|im_end\|>'", "X")
        .replace(r"'<\|turn_end\|>'", r"'<\|im_end\|>'")
        .replace("X", r"'<\|turn_end\|>'")
    )
    with pytest.raises(ModelError, match=line):
        build(opd.parse_config(tree))
    backend = build(opd.parse_config(tree | {"objective": {"type": "immediate"}}))
    assert set(backend.cross_tokenizer) == {"even", "odd"}
    items = [i for i in sampled(backend) if i.num_actions]
    assert all(isinstance(s.score, ChunkScore) for s in backend.teachers(keep_hidden=False).score(items))
    tree["teachers"] = {n: t | {"template": "student"} for n, t in tree["teachers"].items()}
    assert not build(opd.parse_config(tree)).cross_tokenizer


def test_kept_scores_are_of_the_prompts_that_the_teacher_read(tmp_path: Path):
    found = {}
    for name, changes in {"own": {}, "student": {"template": "student"}}.items():
        config = opd.parse_config(own_templates(tmp_path / name, **changes))
        found[name] = identities(config, build(config))["even"]
    other = opd.parse_config(own_templates(tmp_path / "third", teacher=CHATTY.replace("in full", "briefly")))
    found["third"] = identities(other, build(other))["even"]
    assert "prompts" not in found["student"]
    assert found["own"]["prompts"] != found["third"]["prompts"]


def test_a_run_is_not_continued_with_another_template_of_its_teacher(tmp_path: Path):
    config = opd.parse_config(own_templates(tmp_path, steps=2, optimizer={"schedule": "constant"}))
    opd.train(config)
    templated(CHATTY.replace("in full", "briefly")).save_pretrained(tmp_path / "theirs")
    with pytest.raises(opd.OpdError, match=r"the tokenizer of teacher 'even' is not what this run began with"):
        opd.Trainer(tmp_path / "run").resume(["steps=3"])


def test_a_served_teacher_that_renders_prompts_otherwise_is_refused_or_said(tmp_path: Path):
    client = Client(RemoteConfig(timeout_s=60.0, attempts=2, first_wait_s=0.01, longest_wait_s=0.05))
    try:
        with serving(toy_model(7)) as server:
            ours = server.tokenizer
            teacher = connect("t", Endpoint("teacher 't'", (server.url,)), client, ours)
            assert compare_templates(teacher, ours, own=True).template is None
            server.tokenizer = templated(CHATTY, added=None)
            with pytest.raises(ModelError, match=r"teacher 't': its chat template renders a question as 'You talk"):
                compare_templates(teacher, ours, own=True)
            said = compare_templates(teacher, ours, own=False).template
            assert said is not None
            assert not said.own
            assert said.student == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
            assert said.teacher.startswith("You talk")
            server.tokenizer.chat_template = None  # a server without one answers no conversation
            unknown = compare_templates(teacher, ours, own=True).template
            assert unknown is not None
            assert unknown.unknown
    finally:
        client.close()


def test_a_teacher_whose_template_needs_an_id_without_a_row_says_so_and_loses_no_run(tmp_path: Path):
    ours = save_templated(tmp_path / "mine", templated(TERSE))
    theirs = save_templated(tmp_path / "theirs", templated("<|turn_end|>" + TERSE), 1)
    for source, rows in ((ours, 258), (theirs, 258)):
        toy_model(0, vocab_size=rows).save_pretrained(source)
    teachers = {n: {"model": theirs} for n in ("even", "odd")}
    backend = build(opd.parse_config(toy_recipe(tmp_path, student=ours, teachers=teachers)))
    [scored, *_] = backend.teachers(keep_hidden=False).score(sampled(backend))
    assert isinstance(scored.score, FailedScore)
    assert "teacher 'even': prompt 'p0': the chat template needs token '<|turn_end|>' (id 258)" in scored.score.reason


def test_prompts_that_a_teachers_template_refuses_are_left_out_of_the_warm_up_and_of_its_own_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = own_templates(tmp_path, ending(IM_END), NO_SYSTEM, warmup={"steps": 1}, steps=2)
    path = Path(tree["tasks"]["first"]["path"])
    said = [json.loads(line) for line in path.read_text().splitlines()]
    for record in said[4:]:
        record["messages"] = [{"role": "system", "content": "s"}, {"role": "user", "content": record.pop("prompt")}]
    path.write_text("\n".join(map(json.dumps, said)) + "\n")
    tree["tasks"]["first"]["held_out_path"] = str(path)
    assert opd.train(opd.parse_config(tree | {"sampling": {"prompts_per_step": 16, "max_new_tokens": 6}})).finished
    shown = capsys.readouterr().out
    assert "responses left out" in shown
    assert "teacher 'even' alone is not measured on first held_out: prompt" in shown


@pytest.mark.parametrize(
    "teacher",
    [
        ending(IM_END).replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"),
        "{% if tools %}{{ tools | tojson }}{% endif %}" + ending(IM_END),
        ending(IM_END).replace("{{ m.content }}", "{{ m.content if m.role == 'user' else m.content | upper }}"),
    ],
    ids=["drops earlier thoughts", "shows tools", "writes system messages in capitals"],
)  # fmt: skip
def test_templates_that_differ_only_in_some_conversations_are_told_apart(teacher: str):
    apart = different_renderings(templated(ending(IM_END)), templated(teacher))
    assert apart is not None
    assert apart.student != apart.teacher
    assert different_renderings(templated(teacher), templated(teacher)) is None


def test_two_models_with_a_clock_in_their_template_render_alike(tmp_path: Path):
    sources = [save_templated(tmp_path / name, templated(CLOCK + ending(IM_END)), 1) for name in ("a", "b")]
    assert compare(*sources).renderings is None
