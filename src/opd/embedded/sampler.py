"""Sampling from the student in process: one packed prefill, then rows that end one by one."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from opd.config import EpisodesConfig
from opd.data.seeds import generator_of
from opd.data.tree import TokenTree, pack_trees
from opd.embedded.network import Network
from opd.records import Finish, Prompt, Rollout
from opd.roles import Seed
from opd.tasks.episodes import Episode, EpisodePlayer, MakeEnvironment, Taken
from opd.text.chat import Chat
from opd.text.tokenizer import end_token_ids

_COMPACT_BELOW = 0.75  # rows are dropped from the cache once this share or less is still growing


class EmbeddedSampler:
    """Samples from the full distribution softmax(logits / temperature) of one adapter of a network.

    The draws are a function of (weights, prompts, seed) alone: row i uses row i of `uniforms`, whatever else is sampled
    beside it, so splitting a batch changes nothing but rounding.
    """

    def __init__(
        self,
        network: Network,
        *,
        adapter: str | None,
        temperature: float,
        max_new_tokens: int,
        max_rows: int,
        max_tokens: int,
        player: EpisodePlayer,
    ) -> None:
        self._network = network
        self._adapter = adapter
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._player = player
        self._version = 0

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """The learner trains the very weights that this sampler reads; only the version moves."""
        self._version = policy_version

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, seed: Seed) -> list[Rollout]:
        seen: Counter[str] = Counter()  # a prompt that stands twice goes on counting, so that ids stay unique
        rows: list[tuple[Prompt, int]] = []
        for prompt in prompts:
            rows += [(prompt, seen[prompt.id] + k) for k in range(num_samples)]
            seen[prompt.id] += num_samples
        draws: dict[int, Tensor] = {}

        def take_turns(episodes: Sequence[Episode]) -> list[Taken]:
            turn = episodes[0].turn  # episodes go in step
            if turn not in draws:
                draws.clear()
                own = seed if turn == 0 else (*seed, "turn", turn)
                draws[turn] = uniforms(own, len(rows), self._max_new_tokens)
            return self._take_turns(episodes, draws[turn])

        return self._player.play(rows, take_turns, version=self._version)

    def _take_turns(self, episodes: Sequence[Episode], draws: Tensor) -> list[Taken]:
        """One turn of each episode, as many tokens as its limit and the student's context allow."""
        self._network.activate(self._adapter)
        limit = self._network.max_context
        room = [
            self._max_new_tokens if limit is None else min(self._max_new_tokens, limit - len(e.token_ids))
            for e in episodes
        ]
        taken = [Taken([], [], "context")] * len(episodes)
        fits = [i for i, left in enumerate(room) if left > 0]
        for start in range(0, len(fits), self._max_rows):
            part = fits[start : start + self._max_rows]
            mine = draws[[episodes[i].row for i in part]]
            grown = self._grow([episodes[i].token_ids for i in part], mine, [room[i] for i in part])
            for i, row in zip(part, grown, strict=True):
                assert row.finish is not None
                cut = row.finish == "length" and room[i] < self._max_new_tokens
                taken[i] = Taken(row.tokens, row.logprobs, "context" if cut else row.finish)
        return taken

    @torch.no_grad()
    def _grow(self, prompts: Sequence[list[int]], draws: Tensor, room: Sequence[int]) -> list["_Response"]:
        """Extend every prompt until its turn ends or its `room`, a number of tokens, is used up.

        Samples that share all tokens so far (a group, at first) share one row of the batch; a row is split where they
        part.
        """
        network, device = self._network, self._network.device
        distinct = {tuple(p): i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        hidden, cache, visible = self._prefill(list(distinct))
        positions = visible.sum(-1)
        responses = [_Response() for _ in prompts]
        rows = {i: distinct[tuple(p)] for i, p in enumerate(prompts)}  # growing sample -> its row
        for step in range(max(room)):
            live = list(rows)
            tokens, logprobs = self._draw(hidden, list(rows.values()), draws[live, step])
            for sample, token, logprob in zip(live, tokens, logprobs, strict=True):
                responses[sample].append(token, logprob, ends=self._player.end_ids, limit=room[sample])
            pairs = {s: (rows[s], t) for s, t in zip(live, tokens, strict=True) if responses[s].finish is None}
            if not pairs:
                break
            rows, parents, inputs = _split(pairs, len(hidden))
            if parents is not None:
                keep = torch.tensor(parents, device=device)
                positions, visible = positions[keep], visible[keep]
                cache.batch_select_indices(keep)
            visible = torch.cat([visible, visible.new_ones(len(visible), 1)], dim=-1)
            hidden = network.decode_step(torch.tensor(inputs, device=device), positions, visible, cache)
            positions = positions + 1
        return responses

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Run the prompts through the model, packed into passes of at most `max_tokens` distinct tokens.

        Returns (the last hidden state of each [rows, hidden], a cache of one left-padded row each, which cached positions
        are theirs [rows, longest] bool).
        """
        longest = max(map(len, prompts))
        states, layers, visible = [], [], []
        for _, tree in pack_trees(prompts, max_tokens=self._max_tokens):
            packed = DynamicCache()
            hidden = self._network.hidden_states(tree, cache=packed)
            states.append(hidden[torch.tensor([int(path[-1]) for path in tree.paths], device=hidden.device)])
            rows, seen = _rows_of(packed, tree, longest, hidden.device)
            layers.append(rows)
            visible.append(seen)
        joined = [
            (torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])) for parts in zip(*layers, strict=True)
        ]
        return torch.cat(states), DynamicCache(joined), torch.cat(visible)

    def _draw(self, hidden: Tensor, rows: list[int], draws: Tensor) -> tuple[list[int], list[float]]:
        """One token a sample by inversion of its row's distribution function, and its log-probability."""
        logits = (hidden @ self._network.head_weight().T).float() / self._temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        # float64: in float32 the rounding of a sum over a vocabulary would move rare tokens' probabilities
        cdf = logprobs.double().exp().cumsum(-1)
        tokens = []
        for row, draw in zip(rows, draws.tolist(), strict=True):
            mark = draw * cdf[row, -1]
            tokens.append(min(int(torch.searchsorted(cdf[row], mark, right=True)), cdf.shape[-1] - 1))
        return tokens, logprobs[rows, tokens].tolist()


def episode_player(network: Network, limits: EpisodesConfig, make_environment: MakeEnvironment) -> EpisodePlayer:
    """Plays episodes in a network's own template; its end tokens end a turn."""
    ends = end_token_ids(network.tokenizer, network.base.generation_config)
    return EpisodePlayer(Chat(network.tokenizer), limits, end_ids=ends, make_environment=make_environment)


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


def _split(pairs: dict[int, tuple[int, int]], num_rows: int) -> tuple[dict[int, int], list[int] | None, list[int]]:
    """The rows of the next pass, from each growing sample's (row, token).

    Returns (sample -> row, which old row each new row continues, or None when the rows stay as they are, the rows' tokens).
    Rows that ended are dropped when a row is split or when no more than `_COMPACT_BELOW` of the rows still grow.
    """
    continued = dict.fromkeys(pairs.values())
    parents = [row for row, _ in continued]
    unsplit = len(set(parents)) == len(parents)
    if unsplit and len(parents) > _COMPACT_BELOW * num_rows:
        inputs = [0] * num_rows  # an ended row is fed anything; nothing reads it
        for row, token in continued:
            inputs[row] = token
        return {sample: row for sample, (row, _) in pairs.items()}, None, inputs
    place = {pair: i for i, pair in enumerate(continued)}
    return {sample: place[pair] for sample, pair in pairs.items()}, parents, [token for _, token in continued]


def _rows_of(
    packed: DynamicCache, tree: TokenTree, longest: int, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Each path's keys and values as a row, padded on the left to `longest`.

    Returns ((keys, values) of every layer [rows, heads, longest, size], visible [rows, longest] bool).
    """
    index = np.zeros((len(tree.paths), longest), dtype=np.int64)
    visible = np.zeros((len(tree.paths), longest), dtype=bool)
    for i, path in enumerate(tree.paths):
        index[i, longest - len(path) :] = path
        visible[i, longest - len(path) :] = True
    where = torch.from_numpy(index).to(device)
    layers = [
        (k[0][:, where].transpose(0, 1), v[0][:, where].transpose(0, 1))
        for k, v, _ in packed
        if k is not None and v is not None
    ]
    return layers, torch.from_numpy(visible).to(device)
