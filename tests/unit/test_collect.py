"""Sampling and scoring of a step: what a server lost is lost with all that belongs to it."""

from collections.abc import Sequence
from dataclasses import replace

from factories import prompt, rollout, scored

from opd.loop import score_usable
from opd.records import FailedScore, Rollout, ScoredRollout


class Ones:
    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return [scored(item, [-1.0] * item.num_actions) for item in rollouts]


def test_every_part_of_a_lost_episode_is_lost_and_what_an_environment_broke_is_not():
    asked = prompt()
    plain = [rollout([1, 2, 3], 1, prompt=asked, sample=sample) for sample in (0, 1, 1, 2)]
    given = [
        plain[0],
        replace(plain[1], failure="no answer"),
        replace(plain[2], failure="no answer", part=1, events={"lost": 1}),
        replace(plain[3], failure="its environment broke"),
    ]
    found = score_usable(Ones(), given)
    assert [item.rollout for item in found] == given
    assert [item.score.lost if isinstance(item.score, FailedScore) else None for item in found] == [
        None,
        True,
        True,
        False,
    ]
