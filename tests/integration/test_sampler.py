"""The sampler in process: it draws from the student's full distribution and records what it drew."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from factories import merged_model, plain_logprobs, prompt, save_adapter, save_toy, toy_model

from opd.config import ComputeConfig, EpisodesConfig
from opd.episodes.player import one_turn
from opd.local.sampler import LocalSampler, episode_player
from opd.models.loading import load_network
from opd.models.lora import add_adapter
from opd.models.network import Network
from opd.records import Prompt, Rollout

TEXTS = ("hi", "hi there", "hi there, you", "a quite different and rather longer question", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_toy(tmp_path_factory.mktemp("toy"), 0)


@pytest.fixture
def network(folder: str) -> Network:
    return load_network(folder, ComputeConfig(device="cpu"))


def sample(
    network: Network,
    prompts: Sequence[Prompt],
    num_samples: int = 4,
    *,
    seed: int = 7,
    adapter: str | None = None,
    temperature: float = 1.0,
    **limits: int,
) -> list[Rollout]:
    """limits: max_new_tokens, max_rows, max_tokens."""
    chosen = {"max_new_tokens": 12, "max_rows": 64, "max_tokens": 2048} | limits
    player = episode_player(network, EpisodesConfig(), one_turn)
    sampler = LocalSampler(network, adapter=adapter, temperature=temperature, player=player, **chosen)
    return sampler.sample(prompts, num_samples=num_samples, seed=(seed,))


def several() -> list[Prompt]:
    """Prompts of different lengths, some of which are heads of others."""
    return [prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]


def assert_recorded_as_drawn(rollouts: Sequence[Rollout], model: torch.nn.Module, temperature: float = 1.0) -> None:
    for item in rollouts:
        expected = plain_logprobs(model, item, temperature=temperature)
        np.testing.assert_allclose(item.rollout_logprobs[item.loss_mask], expected, atol=1e-4, err_msg=item.id)
        assert not item.rollout_logprobs[~item.loss_mask].any()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """(statistic, degrees of freedom), with the cells that expect fewer than five joined into one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return float(((observed - expected) ** 2 / np.maximum(expected, 1e-12)).sum()), len(observed) - 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_are_those_of_a_plain_forward_pass_of_each_rollout(network: Network, temperature: float):
    rollouts = sample(network, several(), temperature=temperature)
    assert len(rollouts) == 4 * len(TEXTS)
    assert len({len(r.token_ids) for r in rollouts}) > 3
    assert_recorded_as_drawn(rollouts, toy_model(0), temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_as_frequent_as_the_softmax_says(network: Network, temperature: float):
    rollouts = sample(network, [prompt()], 4000, temperature=temperature, max_new_tokens=1, max_rows=4000)
    drawn = np.array([r.token_ids[-1] for r in rollouts])
    head = torch.tensor(rollouts[0].token_ids[:-1].tolist())
    with torch.no_grad():
        logits = toy_model(0)(input_ids=head[None]).logits[0, -1].double()
    counts = np.bincount(drawn, minlength=len(logits))
    statistic, freedom = chi_square(counts, torch.softmax(logits / temperature, -1).numpy())
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    # The same draws are told from another temperature's, so the test above can fail.
    other, freedom = chi_square(counts, torch.softmax(logits / (1.2 * temperature), -1).numpy())
    assert other > freedom + 20 * np.sqrt(2 * freedom)


def test_successive_tokens_of_one_row_use_draws_of_their_own(network: Network):
    rollouts = sample(network, [prompt()], 400, max_new_tokens=2, max_rows=400)
    # The place of each draw in its own distribution is uniform and independent of the draw before.
    places = []
    model = toy_model(0)
    for item in rollouts:
        if item.num_actions == 2:
            ids = torch.tensor(item.token_ids.tolist())
            with torch.no_grad():
                p = torch.softmax(model(input_ids=ids[None]).logits[0].double(), -1).numpy()
            below = [p[t - 1, : ids[t]].sum() + p[t - 1, ids[t]] / 2 for t in (len(ids) - 2, len(ids) - 1)]
            places.append(below)
    first, second = np.array(places).T
    assert len(first) > 300
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
    assert abs(second.mean() - 0.5) < 0.06


@pytest.mark.parametrize(
    "limits", [{"max_rows": 1}, {"max_rows": 3}, {"max_rows": 7}, {"max_tokens": 1}, {"max_tokens": 60}]
)
def test_smaller_parts_draw_the_same_tokens(network: Network, limits: dict[str, int]):
    whole = sample(network, several())
    parts = sample(network, several(), **limits)
    assert [r.id for r in parts] == [r.id for r in whole]
    for a, b in zip(parts, whole, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.finish == b.finish
        np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 20, 40])
def test_smaller_passes_over_the_prompts_draw_the_same_tokens(network: Network, max_tokens: int):
    whole = sample(network, several())
    parts = sample(network, several(), max_tokens=max_tokens)
    for a, b in zip(parts, whole, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, rtol=1e-5, atol=1e-5)


def test_a_prompt_draws_the_same_tokens_alone_and_beside_others_of_its_prefix(network: Network):
    first, *_ = prompts = several()
    alone = sample(network, [first], 4)
    beside = sample(network, prompts, 4)[:4]
    assert [r.token_ids.tolist() for r in alone] == [r.token_ids.tolist() for r in beside]
    assert len({tuple(r.token_ids.tolist()) for r in alone}) == 4


def test_the_seed_alone_decides_the_draws(network: Network):
    def draws(seed: int) -> list[list[int]]:
        return [r.token_ids.tolist() for r in sample(network, several(), seed=seed)]

    first = draws(1)
    torch.manual_seed(99)
    assert draws(1) == first
    assert draws(2) != first


def test_the_end_token_is_an_action_and_a_cut_response_is_marked(network: Network):
    end = network.tokenizer.eos_token_id
    rollouts = sample(network, several(), 16, max_new_tokens=12)
    for item in rollouts:
        actions = item.token_ids[item.loss_mask].tolist()
        assert end not in actions[:-1]
        if item.finish == "end":
            assert actions[-1] == end
            assert item.loss_mask[-1]
            assert item.rollout_logprobs[-1] < 0
        else:
            assert item.finish == "length"
            assert actions[-1] != end
            assert len(actions) == 12
    ended = [r for r in rollouts if r.finish == "end"]
    assert 0 < len(ended) < len(rollouts)
    assert all("<|im_end|>" not in r.response for r in ended)


def test_an_end_token_drawn_at_the_limit_ends_the_turn(network: Network):
    rollouts = sample(network, [prompt()], 3000, max_new_tokens=1, max_rows=3000)
    end = network.tokenizer.eos_token_id
    ended = [r for r in rollouts if r.token_ids[-1] == end]
    assert ended
    assert {r.finish for r in ended} == {"end"}
    assert {r.finish for r in rollouts if r.token_ids[-1] != end} == {"length"}


def test_a_prompt_of_one_token_is_sampled_from(network: Network):
    network.tokenizer.chat_template = None
    rollouts = sample(network, [prompt("short", "a"), prompt("longer", "abc")], 3)
    assert [r.turns[0].end for r in rollouts] == [1, 1, 1, 3, 3, 3]
    assert_recorded_as_drawn(rollouts, toy_model(0))


def test_one_new_token_is_one_action(network: Network):
    rollouts = sample(network, several(), max_new_tokens=1)
    assert {r.num_actions for r in rollouts} == {1}
    assert_recorded_as_drawn(rollouts, toy_model(0))


def test_a_rollout_says_which_tokens_are_the_students_and_what_they_mean(network: Network):
    player = episode_player(network, EpisodesConfig(), one_turn)
    sampler = LocalSampler(
        network, adapter=None, temperature=1.0, max_new_tokens=8, max_rows=64, max_tokens=64, player=player
    )
    sampler.load_weights({}, policy_version=3)
    for item in sampler.sample(several(), num_samples=2, seed=(0,)):
        head, answer = item.turns
        assert (head.author, head.start, answer.author, answer.end) == ("prompt", 0, "student", len(item.token_ids))
        assert head.end == answer.start
        assert np.flatnonzero(item.loss_mask).tolist() == list(range(answer.start, answer.end))
        text = network.tokenizer.decode(item.token_ids[: head.end])
        assert text.endswith(f"{item.prompt.messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
        tokens = network.tokenizer.decode(item.token_ids[head.end :], skip_special_tokens=True)
        assert item.messages == (*item.prompt.messages, {"role": "assistant", "content": tokens})
        assert item.policy_version == 3


def test_a_sampler_speaks_as_its_own_adapter_whichever_was_active(
    network: Network, folder: str, tmp_path_factory: pytest.TempPathFactory
):
    path = save_adapter(tmp_path_factory.mktemp("adapter"), folder, 5)
    add_adapter(network, path, teacher="t", name="expert")
    bare = sample(network, several())
    expert = sample(network, several(), adapter="expert")
    again = sample(network, several())
    assert_recorded_as_drawn(expert, merged_model(folder, path))
    assert_recorded_as_drawn(again, toy_model(0))
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in bare]
    assert [r.token_ids.tolist() for r in expert] != [r.token_ids.tolist() for r in bare]


def test_a_prompt_that_stands_twice_in_a_batch_goes_on_counting_its_samples(network: Network):
    twice = [prompt("p0"), prompt("p1"), prompt("p0")]
    rollouts = sample(network, twice, 2)
    assert [r.id for r in rollouts] == ["p0/0", "p0/1", "p1/0", "p1/1", "p0/2", "p0/3"]
