"""Verifiers read what a response says behind its thoughts."""

from dataclasses import replace
from typing import Any

import pytest
from factories import byte_tokenizer, prompt, rollout

from opd.config import EpisodesConfig, ReasoningGymTask
from opd.episodes.player import Demonstrator, EpisodePlayer, one_turn
from opd.integrations.reasoning_gym import ReasoningGym
from opd.records import Message, Prompt, Rollout
from opd.rewards.judge import Judge
from opd.rewards.verifiers import VERIFIERS
from opd.text.chat import Chat
from opd.text.special_tags import THOUGHTS, behind_thoughts

PAIRS = sorted(THOUGHTS.items())


@pytest.mark.parametrize("verifier", ["exact", "number", "math"])
@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_what_counts_follows_the_last_thought(verifier, opening, closing):
    verify = VERIFIERS[verifier]
    assert verify(f"{opening}2 + 2 is 5{closing}\n\n4", "4") == 1.0
    assert verify(f"2 + 2 is 5{closing}\n\n4", "4") == 1.0  # the prompt has opened it
    assert verify(f"{opening}5{closing}3{opening}6{closing} 4", "4") == 1.0
    assert verify(f"{opening}maybe it is 4", "4") == 0.0
    assert verify(f"{opening}maybe 4{closing}4{opening}or", "4") == 0.0
    assert verify(f"{opening}it is 4{closing}", "4") == 0.0
    assert verify(f"{opening}it is 4{closing} 5", "4") == 0.0
    assert verify(f"{opening}I end with {'</note>'} 4", "4") == 0.0


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("4", "4"),
        ("", ""),
        ("<THINK>a</Think>4", "4"),
        ("<think>a</thinking>4", None),
        ("<think>a <think> b</think>4", "4"),
        ("<think>a</think>b</think>4", "4"),
        ("<answer>4</answer>", "<answer>4</answer>"),
    ],
)
def test_a_thought_ends_with_its_own_tag(response, said):
    assert behind_thoughts(response) == said


def test_reasoning_gym_scores_what_follows_a_thought():
    config = ReasoningGymTask(type="reasoning_gym", dataset="basic_arithmetic", teacher="t", size=1, held_out_size=0)
    task = ReasoningGym("sums", config)
    [item] = task.prompts("train")
    assert task.reward(item, f"<think>hm</think>\n{item.answer}") == 1.0
    assert task.reward(item, f"<think>{item.answer}") == 0.0


def sampled(turn: str, *, opens: str) -> Rollout:
    """One response, whose generation prompt ends with `opens`."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", f"assistant\n{opens}' }}}}")
    question = [{"role": "user", "content": "?"}]
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False).endswith(opens)

    def write(item: Prompt, messages: Any) -> str:
        return turn

    ends = [tokenizer.eos_token_id]
    player = EpisodePlayer(Chat(tokenizer), EpisodesConfig(), end_ids=ends, make_environment=one_turn)
    item = replace(prompt(answer="4"), id="p")
    [found] = player.play([(item, 0)], Demonstrator(Chat(tokenizer), write).take_turns, version=0)
    return found


@pytest.mark.parametrize(
    ("opens", "turn", "worth"),
    [
        ("<think>\n", "it is 4", 0.0),
        ("<think>\n", "it is 5</think>4", 1.0),
        ("<think>\n\n</think>\n\n", "4", 1.0),
        ("", "<think>it is 4", 0.0),
        ("", "4", 1.0),
    ],
)
def test_a_thought_that_the_prompt_has_opened_counts(opens, turn, worth):
    found = sampled(turn, opens=opens)
    judge = Judge(lambda item, response: VERIFIERS["number"](response, item.answer or ""))
    assert judge([found])[0].reward == worth


def test_a_reward_of_the_user_gets_the_response_as_it_was_sampled():
    seen: list[str] = []

    def reward(item: Prompt, response: str) -> float:
        seen.append(response)
        return 1.0

    item = replace(rollout([1, 2], 1, prompt=prompt()), reward=None, opened="<think>")
    Judge(reward, own_code=True)([item])
    Judge(reward)([item])
    assert seen == ["response", "<think>response"]


def test_a_text_that_a_base_model_continues_may_open_a_thought():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    said: Message = {"role": "user", "content": "2 + 2? <think>"}
    ends = [tokenizer.eos_token_id]
    player = EpisodePlayer(Chat(tokenizer), EpisodesConfig(), end_ids=ends, make_environment=one_turn)
    item = Prompt("p", (said,), teacher="t", task="task")
    [found] = player.play([(item, 0)], Demonstrator(Chat(tokenizer), lambda p, m: "4").take_turns, version=0)
    assert found.opened == "<think>"
