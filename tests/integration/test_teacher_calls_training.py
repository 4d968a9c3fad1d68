"""Agents with a teacher that writes calls otherwise: whole episodes against plain forward passes, and a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from call_turns import CALCULATOR, LISTED, SINGLE, Segment, call, chatml, kept_by_hand
from factories import CHATML, byte_tokenizer, toy_model, toy_recipe
from games import Scripted, say
from templated import policy_of, save_cross_tokenizer
from zoo import toy, toy_bpe

import opd
from opd.config import EpisodesConfig
from opd.episodes.player import Demonstrator, EpisodePlayer
from opd.episodes.tool_problems import calculate
from opd.episodes.tools import Tool, ToolEnvironment
from opd.local.teacher import CrossTokenizerPolicy, score_cross_tokenizer
from opd.records import ChunkScore, Message, Prompt, Rollout
from opd.text.call_template import tool_call
from opd.text.chat import Chat

TURNS = (f"I add.\n{call('1 + 2')}", call("3 * 4"), "It is 12.")


def listed(expression: str, number: int) -> tuple[Segment, ...]:
    return (
        ("student", "<tool_call>"),
        ("teacher", "[TOOL_CALLS]["),
        ("both", f'{{"name": "calculator", "arguments": {{"expression": "{expression}"}}'),
        ("student", "}</tool_call>"),
        ("teacher", f', "id": "{number:09d}"}}]'),
    )


SEGMENTS: tuple[tuple[Segment, ...], ...] = (
    (("both", "I add."), ("student", "\n"), *listed("1 + 2", 0)),
    listed("3 * 4", 1),
    (("both", "It is 12."),),
)


def episode(turns: Sequence[str] = TURNS) -> Rollout:
    """What a student that writes bytes says in turn, and what the calculator answers."""
    tool = Tool("calculator", "Evaluate arithmetic.", CALCULATOR["function"]["parameters"], calculate)
    limits = EpisodesConfig()
    prompt = Prompt("p", ({"role": "user", "content": "Add."},), teacher="t", task="task", tools=(tool.schema,))
    tokenizer = byte_tokenizer()

    def solution(prompt: Prompt, messages: Sequence[Message]) -> str:
        return turns[sum(m["role"] == "assistant" for m in messages)]

    player = EpisodePlayer(
        Chat(tokenizer),
        limits,
        end_ids=[tokenizer.eos_token_id],
        make_environment=lambda prompt: ToolEnvironment([tool], lambda response: 1.0, limits),
    )
    [found] = player.play([(prompt, 0)], Demonstrator(Chat(tokenizer), solution).take_turns, version=0)
    return found


def policy_with(folder: Path, answer: str) -> CrossTokenizerPolicy:
    source = save_cross_tokenizer(folder, toy_bpe(390, template=chatml(answer)), max_context=1200)
    policy = policy_of(source, toy("bytes"))
    return CrossTokenizerPolicy(
        policy.network, None, policy.teacher_side, policy.student_side, -50.0, own_syntax="hermes"
    )


def plain_turn(
    policy: CrossTokenizerPolicy, messages: list[Message], tools: Sequence[Any]
) -> tuple[list[str], list[float], float]:
    """The teacher's tokens of the last answer, their log-probabilities and that of ending: the conversation as its template
    writes it, tokenised whole, in one forward pass."""
    tokenizer = policy.teacher_side.tokenizer
    whole, before = (
        tokenizer.apply_chat_template(m, tools=list(tools), tokenize=False, add_generation_prompt=m is not messages)
        for m in (messages, messages[:-1])
    )
    end = whole.rindex("<|im_end|>")
    found = tokenizer(whole[:end], add_special_tokens=False, return_offsets_mapping=True)
    with torch.no_grad():
        logits = policy.network.base(input_ids=torch.tensor([found["input_ids"]])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    inside = [k for k, (_, stop) in enumerate(found["offset_mapping"]) if stop > len(before)]
    assert found["offset_mapping"][inside[0]][0] == len(before)
    pieces = [whole[slice(*found["offset_mapping"][k])] for k in inside]
    each = [float(logprobs[k - 1, found["input_ids"][k]]) for k in inside]
    return pieces, each, float(logprobs[-1, list(policy.teacher_side.end_ids)].logsumexp(-1))


def test_an_episode_of_three_turns_scores_as_the_teachers_own_conversation(tmp_path: Path):
    policy, item = policy_with(tmp_path, LISTED), episode()
    assert [m["role"] for m in item.messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    [found] = score_cross_tokenizer("t", policy, [item], temperature=1.0, max_tokens=256)
    assert isinstance(found, ChunkScore)
    first, second = (tool_call(k, "calculator", {"expression": e}) for k, e in enumerate(("1 + 2", "3 * 4")))
    meant: list[Message] = [
        item.prompt.messages[0],
        {"role": "assistant", "content": "I add.", "tool_calls": [first]},
        {"role": "tool", "content": "3", "tool_call_id": first["id"], "name": "calculator"},
        {"role": "assistant", "content": "", "tool_calls": [second]},
        {"role": "tool", "content": "12", "tool_call_id": second["id"], "name": "calculator"},
        {"role": "assistant", "content": "It is 12."},
    ]
    students = [t for t in item.turns if t.author == "student"]
    masked = 0
    for turn, text, segments, last in zip(students, TURNS, SEGMENTS, (2, 4, 6), strict=True):
        pieces, each, ending = plain_turn(policy, meant[:last], item.prompt.tools)
        assert "".join(pieces) == "".join(t for who, t in segments if who != "student")
        kept, kept_there = kept_by_hand((list(text), pieces), segments)
        by_hand = sum(q for q, keep in zip(each, kept_there, strict=True) if keep) + ending
        assert found.logprobs[turn.start : turn.end].sum() == pytest.approx(by_hand, abs=2e-3)
        assert (found.chunks[turn.start : turn.end] >= 0).tolist() == [*kept, True]
        masked += kept.count(False)
    assert found.facts["masked/syntax"] == masked
    assert found.facts["untranscribed"] == found.facts["rewritten"] == 0
    order = found.chunks[found.chunks >= 0]
    assert (np.diff(order) >= 0).all()
    assert set(order.tolist()) == set(range(order.max() + 1))


def test_an_episode_that_the_template_refuses_is_scored_as_written(tmp_path: Path):
    policy = policy_with(tmp_path, SINGLE)
    item = episode((call("1 + 2") + call("3 * 4"), call("5 - 1"), "4"))
    own = score_cross_tokenizer("t", policy, [item], temperature=1.0, max_tokens=256)[0]
    plain = CrossTokenizerPolicy(policy.network, None, policy.teacher_side, policy.student_side, -50.0)
    written = score_cross_tokenizer("t", plain, [item], temperature=1.0, max_tokens=256)[0]
    assert isinstance(own, ChunkScore)
    assert isinstance(written, ChunkScore)
    assert own.chunks.tolist() == written.chunks.tolist()
    assert own.logprobs == pytest.approx(written.logprobs, abs=1e-4)
    assert (own.facts["untranscribed"], written.facts["untranscribed"]) == (3, 0)
    assert own.facts["masked/syntax"] == 0


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAYS = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def save_caller(folder: Path) -> str:
    """A toy student that has learnt to write one call; returns its folder."""
    tokenizer, model = byte_tokenizer(), toy_model(0, max_context=1200)
    prompt = Prompt("p", ({"role": "user", "content": "say a"},), teacher="t", task="task", tools=(TOOL,))
    before = Chat(tokenizer).encode_prompt(prompt)
    ids = torch.tensor([[*before, *tokenizer(SAYS, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
    labels = torch.where(torch.arange(ids.shape[1]) < len(before), -100, ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(120):
        loss = model(input_ids=ids, labels=labels).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_run_shows_what_the_teachers_own_syntax_leaves_out(tmp_path: Path):
    student = save_caller(tmp_path / "caller")
    prompts = tmp_path / "calls.jsonl"
    prompts.write_text("".join(json.dumps({"id": k, "prompt": "say a", "tools": [TOOL]}) + "\n" for k in range(4)))
    teacher = save_cross_tokenizer(tmp_path / "foreign", toy_bpe(390, template=chatml(LISTED)), max_context=1200)

    def answers(turn: int, text: str) -> opd.Step:
        return say("3", done=turn == 2, reward=0.0)

    found = {}
    for how in ("as_written", "own_syntax"):
        tree = toy_recipe(
            tmp_path / how,
            steps=2,
            objective={"type": "immediate"},
            sampling={"prompts_per_step": 4, "group_size": 1, "max_new_tokens": 60},
            alignment={"tool_calls": how},
            evaluation={"num_prompts": 0},
        )
        tree |= {
            "student": student,
            "teachers": {"even": {"model": teacher}},
            "tasks": {"first": {"type": "file", "path": str(prompts), "teacher": "even"}},
        }
        result = opd.train(opd.parse_config(tree), environment=lambda prompt: Scripted(answers))
        [found[how], _] = opd.read_metrics(result.run)
    assert found["as_written"]["align/even/masked/syntax/mean"] == 0.0
    scored = list(opd.read_rollouts(result.run, 1))
    assert any(SAYS in m["content"] for item in scored for m in item.rollout.messages)
    facts = [item.score.facts for item in scored if isinstance(item.score, ChunkScore)]
    assert len(facts) == 4
    share = sum(f["masked/syntax"] for f in facts) / sum(f["tokens"] for f in facts)
    assert found["own_syntax"]["align/even/masked/syntax/mean"] == pytest.approx(share)
    assert share > 0.1
    assert found["own_syntax"]["align/even/untranscribed/mean"] == 0.0
    assert np.isfinite(found["own_syntax"]["kl/token/even/mean"])


def test_a_teacher_that_writes_no_calls_is_counted_in_the_run(tmp_path: Path):
    policy = policy_of(save_cross_tokenizer(tmp_path, toy_bpe(390, template=CHATML), max_context=1200), toy("bytes"))
    policy = CrossTokenizerPolicy(
        policy.network, None, policy.teacher_side, policy.student_side, -50.0, own_syntax="hermes"
    )
    [found] = score_cross_tokenizer("t", policy, [episode()], temperature=1.0, max_tokens=256)
    assert isinstance(found, ChunkScore)
    assert found.facts["untranscribed"] == 3
