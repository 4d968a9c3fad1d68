"""Sampling in process: packed prompts, then a KV cache with rows that grow by a token a pass, end, and make room."""

from collections.abc import Container, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd.config import EpisodesConfig
from opd.episodes.player import Episode, EpisodePlayer, MakeEnvironment, Taken, numbered, turns_with_room
from opd.models.kv_cache import KVCache
from opd.models.network import Network
from opd.models.padded import PaddedCache
from opd.objectives.draw import invert
from opd.records import Finish, Prompt, Rollout
from opd.roles import Seed, generator_of
from opd.text.chat import Chat

# Waiting prompts begin once this fraction of the rows is free: a pass for each that ends would cost more.
_REFILL = 0.25


@dataclass(eq=False)
class LocalSampler:
    """Samples from the full distribution softmax(logits / temperature) of one adapter of a network.

    The draws are a function of (weights, prompts, seed) alone: row i uses row i of `uniforms`, so splitting a batch changes nothing
    but rounding.
    """

    network: Network
    _: KW_ONLY
    adapter: str | None
    temperature: float
    max_new_tokens: int
    max_rows: int
    max_tokens: int
    player: EpisodePlayer
    _version: int = field(default=0, init=False)

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """The learner trains the very weights that this sampler reads; only the version moves."""
        self._version = policy_version

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, seed: Seed) -> list[Rollout]:
        rows = numbered(prompts, num_samples)
        draws: dict[int, Tensor] = {}

        def take_turns(episodes: Sequence[Episode]) -> list[Taken]:
            turn = episodes[0].turn  # all episodes take their turns together
            if turn not in draws:
                draws.clear()
                own = seed if turn == 0 else (*seed, "turn", turn)
                draws[turn] = uniforms(own, len(rows), self.max_new_tokens)
            return self._take_turns(episodes, draws[turn])

        with self.network.merged(self.adapter):
            return self.player.play(rows, take_turns, version=self._version)

    def _take_turns(self, episodes: Sequence[Episode], draws: Tensor) -> list[Taken]:
        def take(fits: Sequence[Episode], room: Sequence[int]) -> list[Taken]:
            return self._grow([e.token_ids for e in fits], draws[[e.row for e in fits]], room)

        return turns_with_room(episodes, take, context=self.network.max_context, max_new_tokens=self.max_new_tokens)

    @torch.no_grad()
    def _grow(self, prompts: Sequence[list[int]], draws: Tensor, room: Sequence[int]) -> list[Taken]:
        """Extend every prompt until its turn ends or its `room`, a number of tokens, is used up.

        Samples that share all tokens so far (a group, at first) share one row; a row is copied where they part. When responses
        end, the prompts that wait take their places.
        """
        responses = [_Response() for _ in prompts]
        waiting = list(range(len(prompts)))[::-1]
        cache, samples = self.network.new_cache(), list[list[int]]()  # the samples that each row stands for
        hidden = torch.empty(0)
        while waiting or samples:
            free = self.max_rows - sum(map(len, samples))
            if waiting and (not samples or free >= _REFILL * self.max_rows):
                begun = [waiting.pop() for _ in range(min(free, len(waiting)))]
                shared: dict[tuple[int, ...], list[int]] = {}
                for sample in begun:
                    shared.setdefault(tuple(prompts[sample]), []).append(sample)
                found = self.network.prefill(list(shared), cache, max_tokens=self.max_tokens)
                hidden = found if not samples else torch.cat([hidden, found])
                samples += shared.values()
            owners = [row for row, members in enumerate(samples) for _ in members]
            drawn = [sample for members in samples for sample in members]
            places = [len(responses[sample].tokens) for sample in drawn]
            logits = self.network.logits(hidden).float() / self.temperature
            tokens, logprobs = invert(logits, torch.tensor(owners), draws[drawn, places])
            for sample, token, logprob in zip(drawn, tokens, logprobs, strict=True):
                responses[sample].append(token, logprob, ends=self.player.end_ids, limit=room[sample])
            inputs = _part(cache, samples, responses)
            if samples:
                hidden = self.network.decode(inputs, cache)
        return [Taken(r.tokens, r.logprobs, r.finish) for r in responses if r.finish is not None]  # all of them


def episode_player(network: Network, limits: EpisodesConfig, make_environment: MakeEnvironment) -> EpisodePlayer:
    """Plays episodes in a network's own template; the template's end of turn and its declared end tokens end a turn."""
    chat = chat_of(network)
    return EpisodePlayer(chat, limits, end_ids=chat.end.ids, make_environment=make_environment)


def chat_of(network: Network) -> Chat:
    """The conversation format of a network's tokenizer."""
    return Chat(network.tokenizer, rows=network.vocab_size, generation_config=network.base.generation_config)


def uniforms(seed: Seed, rows: int, tokens: int) -> Tensor:
    """The random numbers of one call, [rows, tokens] float64 in [0, 1)."""
    return torch.rand(rows, tokens, dtype=torch.float64, generator=generator_of(*seed))


@dataclass
class _Response:
    """A response while it grows."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def append(self, token: int, logprob: float, *, ends: Container[int], limit: int) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in ends:
            self.finish = "end"
        elif len(self.tokens) == limit:
            self.finish = "length"


def _part(cache: KVCache | PaddedCache, samples: list[list[int]], responses: Sequence[_Response]) -> list[int]:
    """Copy rows where samples part, drop rows without samples; returns each row's next token."""
    inputs: list[int] = []
    for row in range(len(samples)):
        by_token: dict[int, list[int]] = {}
        for sample in samples[row]:
            if responses[sample].finish is None:
                by_token.setdefault(responses[sample].tokens[-1], []).append(sample)
        groups = list(by_token.items()) or [(-1, [])]
        inputs.insert(row, groups[0][0])
        samples[row] = groups[0][1]
        for token, members in groups[1:]:
            cache.copy(row)
            samples.append(members)
            inputs.append(token)
    for row in reversed(range(len(samples))):
        if not samples[row]:
            cache.drop(row)
            samples[row], inputs[row] = samples[-1], inputs[-1]
            samples.pop()
            inputs.pop()
    return inputs
