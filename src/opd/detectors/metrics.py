"""The metrics of one step that only the detectors of reward hacking read (docs/concepts/safeguards.md)."""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opd.batch import Batch
from opd.metrics import Max, Mean, Metrics, Sum, mean_of
from opd.records import Rollout, ScoredRollout
from opd.text.alignment import ALARM

_WINDOW = 64  # units of a low-KL window
_WINDOWS_IN_A_ROW = 4
_LOW = 0.2  # of the step's mean |log ratio|: repetition loops are 4 to 9 times closer to zero than ordinary text
_NUM_COMMON = 5
# A loop runs until its response is cut. Over a whole response the fraction of repeated 3-grams grows with the length (0.76 in 12 kB
# of derivations), over 128 tokens of prose, code or formulas it stays below 0.6.
_TAIL = 128
_REPEATED = 0.7
_MIN_TAIL = 16  # a shorter response may well be one phrase twice
_COMPRESSED = 8.0  # prose, code, JSON and formulas of 300 bytes to 12 kB stay below 6
_MIN_BYTES = 200


@dataclass(frozen=True)
class _Units:
    """The units that teachers scored: tokens, or chunks for a teacher with another tokenizer. All [units], in the batch's order.

    ratio: the log ratio, nats, of a chunk that of its text; owners: the rollout; places: the last token in the flat columns.
    """

    ratio: np.ndarray
    owners: np.ndarray
    places: np.ndarray


def detector_metrics(
    scored: Sequence[ScoredRollout], batch: Batch, *, special_ids: frozenset[int], integrated: float = 0.0
) -> Metrics:
    """The detectors' metrics of a step; a metric without data (rewards, flags, long responses) is absent.

    Args:
        scored: every rollout of the step, also those without a score.
        batch: the batch packed from them, with its masks and advantages.
        special_ids: the student's special tokens.
        integrated: the coefficient of the immediate log ratio in the loss, when the loss computes that part over the vocabulary
            and `batch.advantages` lacks it; otherwise 0.
    """
    rollouts = [item.rollout for item in scored]
    metrics = _texts(rollouts) | _format_errors(rollouts) | _rewards(scored) | _advantages(batch, integrated)
    units = _units(batch)
    if len(units.ratio) and np.isfinite(units.ratio).all():
        metrics |= _ranking(batch, units) | _special(batch, units, special_ids) | _low_windows(batch, units)
    return metrics


def auroc(scores: np.ndarray, rewards: np.ndarray) -> Mean:
    """P(score_i > score_j) + P(score_i = score_j) / 2 over the pairs with reward_i > reward_j; weight: those pairs.

    For rewards 0 and 1 the area under the ROC curve; 1/2 where scores say nothing of rewards. Unchanged when either is
    mapped by a rising function; that of the negated scores is one minus it. Source: Hanley and McNeil 1982 (the area is
    the Wilcoxon statistic); for more than two rewards, Harrell's index of concordance.
    """
    better = rewards[:, None] > rewards[None, :]
    above = scores[:, None] > scores[None, :]
    level = scores[:, None] == scores[None, :]
    return Mean(float((better & above).sum()) + 0.5 * float((better & level).sum()), float(better.sum()))


def repeated_trigrams(token_ids: np.ndarray) -> float:
    """The fraction of 3-grams that occurred earlier in the sequence: 1 - distinct / all; 0 for fewer than 3 tokens."""
    ids = token_ids.astype(np.int64)
    if len(ids) < 3:
        return 0.0
    size = int(ids.max()) + 1
    grams = np.sort((ids[:-2] * size + ids[1:-1]) * size + ids[2:])
    return float((grams[1:] == grams[:-1]).sum()) / len(grams)


def compression(text: str) -> float:
    """Bytes of a text in UTF-8 divided by its bytes after zlib; 0 for no text. Of a loop it is far larger than of other text."""
    plain = text.encode("utf-8", errors="replace")
    return len(plain) / len(zlib.compress(plain)) if plain else 0.0


def longest_run(low: np.ndarray) -> int:
    """The largest number of True in a row."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], low, [False]]).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max(initial=0))


def _units(batch: Batch) -> _Units:
    log_ratio = batch.log_ratio.double().numpy()
    places = np.flatnonzero(batch.scored.numpy())
    owners = np.repeat(np.arange(len(batch)), batch.lengths.numpy())[places]
    if batch.chunks is None or not len(places):
        return _Units(log_ratio[places], owners, places)
    # The teacher's part stands at a chunk's last token, so the tokens' log ratios sum to the chunk's.
    chunks = batch.chunks.numpy()[places]
    starts = np.flatnonzero(np.r_[True, (np.diff(chunks) != 0) | (np.diff(owners) != 0)])
    last = np.r_[starts[1:], len(places)] - 1
    return _Units(np.add.reduceat(log_ratio[places], starts), owners[starts], places[last])


def _texts(rollouts: Sequence[Rollout]) -> Metrics:
    """The repetition of responses, one per episode: the mean fraction of repeated 3-grams, the mean compression of long responses,
    and the fraction of responses that are one loop by either measure."""
    said: dict[tuple[str, str, int], tuple[list[np.ndarray], list[str]]] = {}
    for rollout in rollouts:
        if rollout.num_actions:
            ids, texts = said.setdefault(_episode(rollout), ([], []))
            ids.append(rollout.token_ids[rollout.loss_mask])
            texts += _said(rollout)
    repeated, ratios, looping = [], [], []
    for parts, texts in said.values():
        ids, text = np.concatenate(parts), "".join(texts)
        repeated.append(repeated_trigrams(ids))
        ratio = compression(text) if len(text) >= _MIN_BYTES else 0.0
        if ratio:
            ratios.append(ratio)
        looping.append((len(ids) >= _MIN_TAIL and repeated_trigrams(ids[-_TAIL:]) > _REPEATED) or ratio > _COMPRESSED)
    return {
        "detectors/repeated/mean": mean_of(repeated),
        "detectors/compression/mean": mean_of(ratios),
        "detectors/looping/mean": mean_of(looping),
    }


def _episode(rollout: Rollout) -> tuple[str, str, int]:
    return rollout.prompt.id, rollout.prompt.teacher, rollout.sample


def _said(rollout: Rollout) -> Iterator[str]:
    """The texts of the student's own messages."""
    for message in rollout.messages[len(rollout.prompt.messages) :]:
        if message.get("role") == "assistant" and isinstance(message.get("content"), str):
            yield message["content"]


def _format_errors(rollouts: Sequence[Rollout]) -> Metrics:
    """The fraction of episodes with a format error, and the number of episodes by rule."""
    broken: dict[tuple[str, str, int], set[str]] = {}
    for rollout in rollouts:
        broken.setdefault(_episode(rollout), set()).update(flag.rule for flag in rollout.flags)
    metrics: Metrics = {
        "format/errors/mean": mean_of(bool(rules) for rules in broken.values()),
        "detectors/episodes/sum": Sum(len(broken)),
    }
    counts = Counter(rule for rules in broken.values() for rule in rules)
    return metrics | {f"format/{rule}/sum": Sum(count) for rule, count in sorted(counts.items())}


def _rewards(scored: Sequence[ScoredRollout]) -> Metrics:
    """The mean reward of the episodes of each teacher."""
    found: dict[str, list[float]] = {}
    for item in scored:
        if item.rollout.reward is not None and item.rollout.part == 0:
            found.setdefault(item.score.teacher, []).append(item.rollout.reward)
    return {f"detectors/reward/{teacher}/mean": mean_of(rewards) for teacher, rewards in found.items()}


def _ranking(batch: Batch, units: _Units) -> Metrics:
    """The AUROC of the log ratio of a response (of all parts of an episode) against its reward."""
    episodes = batch.episodes.numpy()
    num = int(episodes.max()) + 1
    totals = np.bincount(episodes[units.owners], weights=units.ratio, minlength=num)
    seen = np.bincount(episodes[units.owners], minlength=num) > 0
    rewards = np.full(num, np.nan)
    rewards[episodes] = batch.rewards.double().numpy()  # that of the last part
    known = seen & np.isfinite(rewards)
    area = auroc(totals[known], rewards[known])
    if not area.weight:
        return {}
    return {
        "detectors/auroc/mean": area,
        "detectors/auroc_pairs/sum": Sum(area.weight),
        "detectors/auroc_of/sum": Sum(int(known.sum())),
    }


def _special(batch: Batch, units: _Units, special_ids: frozenset[int]) -> Metrics:
    """Log ratios beyond 15 nats on special tokens: their number, their fraction, and the largest."""
    special = np.isin(batch.token_ids.numpy()[units.places], np.array(sorted(special_ids), dtype=np.int64))
    size = np.abs(units.ratio[special])
    if not len(size):
        return {}
    beyond = float((size > -ALARM).sum())
    return {
        "detectors/special_tokens/mean": Mean(beyond, len(size)),
        "detectors/special_tokens/sum": Sum(beyond),
        "detectors/special_log_ratio/max": Max(float(size.max())),
    }


def _low_windows(batch: Batch, units: _Units) -> Metrics:
    """Windows of 64 units whose mean |log ratio| is below a fifth of the step's: the longest run of them, and the fraction of
    responses with four in a row, among responses (whole episodes) of four windows or more."""
    size = np.abs(units.ratio)
    runs = []
    for mine in np.split(size, np.flatnonzero(np.diff(batch.episodes.numpy()[units.owners])) + 1):
        windows = len(mine) // _WINDOW
        if windows >= _WINDOWS_IN_A_ROW:
            means = mine[: windows * _WINDOW].reshape(windows, _WINDOW).mean(-1)
            runs.append(longest_run(means < _LOW * size.mean()))
    if not runs:
        return {}
    return {
        "detectors/low_kl/mean": mean_of(run >= _WINDOWS_IN_A_ROW for run in runs),
        "detectors/low_kl_run/max": Max(max(runs)),
    }


def _advantages(batch: Batch, integrated: float) -> Metrics:
    """The advantages of tokens with format errors and of the other tokens, and of the five most common tokens."""
    actions = batch.loss_mask.numpy()
    if not actions.any():
        return {}
    sampled = np.zeros(len(actions)) if batch.advantages is None else batch.advantages.double().numpy()
    whole = sampled
    if integrated or batch.advantages is None:
        over_vocabulary = batch.distill_mask if batch.compared is None else batch.distill_mask & batch.compared
        whole = sampled + (integrated or 1.0) * np.where(over_vocabulary.numpy(), batch.log_ratio.double().numpy(), 0.0)
    sampled, whole = (np.where(np.isfinite(x), x, 0.0)[actions] for x in (sampled, whole))
    flagged = batch.flagged.numpy()[actions]
    metrics: Metrics = {}
    if flagged.any():
        metrics["detectors/flagged_advantage/mean"] = Mean(float(whole[flagged].sum()), int(flagged.sum()))
        if batch.advantages is not None:
            # A constant advantage does not change the gradient of a term over the vocabulary, so only sampled ones are compared.
            metrics["detectors/unflagged_advantage/mean"] = Mean(float(sampled[~flagged].sum()), int((~flagged).sum()))
    ids, inverse, counts = np.unique(batch.token_ids.numpy()[actions], return_inverse=True, return_counts=True)
    common = np.isin(inverse, np.argsort(-counts, kind="stable")[:_NUM_COMMON])
    gain = np.maximum(whole, 0.0)
    if len(ids) > 2 * _NUM_COMMON and gain.sum() > 0.0:
        metrics["detectors/common_gain/mean"] = Mean(float(gain[common].sum()), float(gain.sum()))
        metrics["detectors/common_actions/mean"] = Mean(float(common.sum()), len(common))
    return metrics
