"""Samples from a model behind servers: one request for each turn of an episode, all at once."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

from opd.episodes.player import Episode, EpisodePlayer, Taken, numbered, turns_with_room
from opd.records import Prompt, Rollout
from opd.remote.client import Answer, Client, Deployment, Endpoint, Request
from opd.remote.protocol_base import Sampled, SamplingParams, ServerProtocol
from opd.remote.vllm import VllmProtocol
from opd.roles import Seed, generator_of


@dataclass(eq=False)
class RemoteSampler:
    """Samples from the full distribution of a model behind servers (`opd.roles.Sampler`). context: the longest sequence that the
    model takes, in tokens, where its servers allow more.

    Each call of `sample` keeps the weights that it began with. Lost requests are made once more at the addresses that the
    deployment has by then. Each turn has its own seed, made from the seed of the call and the turn's place, so a server that
    samples by seed repeats itself. A turn that no server answers ends its episode, which counts as lost. Threads may share one.
    """

    deployment: Deployment
    client: Client
    _: KW_ONLY
    temperature: float
    max_new_tokens: int
    context: int | None
    player: EpisodePlayer
    protocol: ServerProtocol = field(default_factory=VllmProtocol)
    # where new calls go, and the policy version there
    _now: tuple[Endpoint | None, int] = field(default=(None, 0), init=False)

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Later calls sample from the latest weights."""
        with self.deployment.updating():
            self._now = self.deployment.latest(), policy_version

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, seed: Seed) -> list[Rollout]:
        rows = numbered(prompts, num_samples)
        with self.deployment.in_use():
            endpoint, version = self._now
            endpoint = endpoint or self.deployment.latest()
            return self.player.play(rows, partial(self._take_turns, endpoint=endpoint, seed=seed), version=version)

    def _take_turns(self, episodes: Sequence[Episode], *, endpoint: Endpoint, seed: Seed) -> list[Taken]:
        def take(fits: Sequence[Episode], room: Sequence[int]) -> list[Taken]:
            requests = [self._request(endpoint, e, left, seed) for e, left in zip(fits, room, strict=True)]
            return list(map(_taken, self.client.send_to(self.deployment, requests)))

        context = min((c for c in (self.context, endpoint.context) if c is not None), default=None)
        return turns_with_room(episodes, take, context=context, max_new_tokens=self.max_new_tokens)

    def _request(self, endpoint: Endpoint, episode: Episode, room: int, seed: Seed) -> Request[Sampled]:
        params = SamplingParams(
            max_tokens=room,
            temperature=self.temperature,
            seed=generator_of(*seed, "row", episode.row, "turn", episode.turn).initial_seed(),
            end_ids=self.player.end_ids,
        )
        body = self.protocol.sample_body(endpoint, episode.token_ids, params)
        read = partial(self.protocol.read_sample, params=params)
        return Request(endpoint, self.protocol.path, body, read)


def _taken(answer: Answer[Sampled]) -> Taken:
    found = answer.value
    if found is None:
        return Taken([], [], "failed", failure=answer.reason, retries=answer.retries)
    return Taken(found.token_ids, found.logprobs, found.finish, retries=answer.retries)
