"""Sampling from a model behind servers: turns of episodes, all asked for at once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from opd.episodes.player import Episode, EpisodePlayer, Taken, numbered
from opd.records import Prompt, Rollout
from opd.remote.client import Answer, Call, Client, Endpoint
from opd.remote.endpoints import RemoteModel
from opd.remote.protocol import Form, Sampled
from opd.remote.vllm import VLLM
from opd.roles import Seed
from opd.seeds import generator_of


class RemoteSampler:
    """Samples from the full distribution of the model that servers hold; `context` is the longest sequence that it takes, where
    that is less than its servers do.

    Every call of `sample` stays with the version that it began with; what no server gave is asked for once more, at the addresses
    that the model has by then. Every turn has a seed of its own, made from that of the call
    and its place, so a server that draws by seed repeats itself. A turn that nobody gave ends its episode, which is counted as
    lost. Threads may share a sampler.
    """

    def __init__(
        self,
        model: RemoteModel,
        client: Client,
        *,
        temperature: float,
        max_new_tokens: int,
        context: int | None,
        player: EpisodePlayer,
        form: Form = VLLM,
    ) -> None:
        self._form = form
        self._model = model
        self._client = client
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._context = context
        self._player = player
        self._now: tuple[Endpoint | None, int] = (None, 0)  # where new calls go, and the version that is there

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Calls that begin from now on sample from the model as it is now."""
        with self._model.changing():
            self._now = self._model.newest(), policy_version

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, seed: Seed) -> list[Rollout]:
        rows = numbered(prompts, num_samples)
        with self._model.using():
            endpoint, version = self._now
            endpoint = endpoint or self._model.newest()
            return self._player.play(rows, partial(self._take_turns, endpoint=endpoint, seed=seed), version=version)

    def _take_turns(self, episodes: Sequence[Episode], *, endpoint: Endpoint, seed: Seed) -> list[Taken]:
        limit = min((c for c in (self._context, endpoint.context) if c is not None), default=None)
        room = [self._room(e, limit) for e in episodes]
        fits = [i for i, left in enumerate(room) if left > 0]
        calls = [self._call(endpoint, episodes[i], room[i], seed) for i in fits]
        answers = self._client.ask_again(calls, self._client.ask(calls), self._model.again)
        taken = [Taken([], [], "context")] * len(episodes)
        for i, answer in zip(fits, answers, strict=True):
            taken[i] = _taken(answer, cut=room[i] < self._max_new_tokens)
        return taken

    def _room(self, episode: Episode, limit: int | None) -> int:
        """How many tokens its next turn may have."""
        if limit is None:
            return self._max_new_tokens
        return min(self._max_new_tokens, limit - len(episode.token_ids))

    def _call(self, endpoint: Endpoint, episode: Episode, room: int, seed: Seed) -> Call[Sampled]:
        body = self._form.sample_body(
            endpoint,
            episode.token_ids,
            max_tokens=room,
            temperature=self._temperature,
            seed=generator_of(*seed, "row", episode.row, "turn", episode.turn).initial_seed(),
            end_ids=self._player.end_ids,
        )
        read = partial(self._form.read_sample, max_tokens=room, end_ids=self._player.end_ids)
        return Call(endpoint, self._form.path, body, read)


def _taken(answer: Answer[Sampled], *, cut: bool) -> Taken:
    """A turn from an answer; cut: its limit was what is left of the context."""
    found = answer.value
    if found is None:
        return Taken([], [], "failed", failure=answer.reason, retries=answer.retries)
    finish = "context" if cut and found.finish == "length" else found.finish
    return Taken(found.token_ids, found.logprobs, finish, retries=answer.retries)
