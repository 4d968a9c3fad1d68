"""Prefix trees, micro-batches and the batch of a step."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from factories import prompt, rollout, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.batch import Batch, pack
from opd.errors import ScoreError
from opd.models.attention import TileGroup, Tiles, tiles_of, visible_keys
from opd.models.packing import TokenTree, micro_batches, pack_trees
from opd.records import FailedScore, HiddenPart, HiddenScore, ScoredRollout

quick = settings(max_examples=50)
# Few token values, so that prefixes are often shared.
sequences_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)


def one_tree(sequences: list[list[int]]) -> TokenTree:
    [(members, tree)] = pack_trees(sequences, max_tokens=1000)
    assert members == list(range(len(sequences)))
    return tree


def visible(tiles: Tiles, group: TileGroup, size: int) -> np.ndarray:
    return visible_keys(tiles, group, size=size, device=torch.device("cpu")).numpy()


def sequences_with_masks(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    sequences = [np.array(s) for s in draw(sequences_of_tokens)]
    masks = []
    for s in sequences:
        flags = draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))
        masks.append(np.array([False, *flags[1:]]))
    return sequences, masks


# --- TokenTree ---


def test_the_worked_example_of_a_tree():
    tree = one_tree([[5, 6, 7], [5, 6, 8]])
    assert tree.token_ids.tolist() == [5, 6, 7, 8]
    assert tree.parents.tolist() == [-1, 0, 1, 1]
    assert tree.positions.tolist() == [0, 1, 2, 2]
    assert [p.tolist() for p in tree.paths] == [[0, 1, 2], [0, 1, 3]]
    assert len(tree) == 4
    tiles = tiles_of(tree, size=4, reach=None)
    [group] = tiles.groups
    assert group.keys.tolist() == [[0, 1, 2, 3]]
    assert (tiles.enter.tolist(), tiles.leave.tolist()) == ([0, 1, 2, 3], [4, 4, 3, 4])
    assert visible(tiles, group, 4)[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


@quick
@given(sequences_of_tokens)
def test_the_path_of_every_sequence_spells_it_out_from_a_root(sequences):
    tree = one_tree(sequences)
    assert len(tree.paths) == len(sequences)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tree.token_ids[path].tolist() == sequence
        assert tree.positions[path].tolist() == list(range(len(sequence)))
        assert tree.parents[path].tolist() == [-1, *path[:-1].tolist()]


@quick
@given(sequences_of_tokens)
def test_every_distinct_prefix_is_stored_once(sequences):
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(one_tree(sequences)) == len(prefixes)


@quick
@given(sequences_of_tokens, st.integers(1, 9))
def test_a_node_sees_itself_and_its_ancestors_and_nothing_else(sequences, size):
    tree = one_tree(sequences)
    expected = np.zeros((len(tree), len(tree)), dtype=bool)
    for path in tree.paths:
        for depth, node in enumerate(path):
            expected[node, path[: depth + 1]] = True
    found = np.zeros_like(expected)
    seen: list[int] = []
    tiles = tiles_of(tree, size=size, reach=None)
    for group in tiles.groups:
        columns = (group.starts, group.ends, group.keys, visible(tiles, group, size))
        for start, end, keys, rows in zip(*columns, strict=True):
            assert 0 < end - start <= size
            seen += range(start, end)
            for node, row in zip(range(start, end), rows, strict=False):
                assert row.sum() == expected[node].sum()  # each key once
                found[node, keys[row]] = True
            assert rows[end - start :].sum() == size - (end - start)  # a place without a node sees one key
    assert sorted(seen) == list(range(len(tree)))
    assert np.array_equal(found, expected)


def test_the_tiles_of_a_tree_are_made_once():
    tree = one_tree([[5, 6, 7], [5, 6, 8]])
    assert tiles_of(tree, size=4, reach=None) is tiles_of(tree, size=4, reach=None)
    assert tiles_of(one_tree([[5, 6, 7], [5, 6, 8]]), size=4, reach=None) is not tiles_of(tree, size=4, reach=None)


@quick
@given(sequences_of_tokens)
def test_tiles_begin_where_branches_do_unless_several_fit(sequences):
    tree = one_tree(sequences)
    begins = [i for i, parent in enumerate(tree.parents) if parent != i - 1]
    for group in tiles_of(tree, size=4, reach=None).groups:
        for start, end in zip(group.starts, group.ends, strict=True):
            inside = [b for b in begins if start < b < end]
            for first, after in pairwise([*inside, end]):
                assert after - first < 4


@quick
@given(sequences_of_tokens)
def test_a_parent_stands_before_its_children(sequences):
    tree = one_tree(sequences)
    assert (tree.parents < np.arange(len(tree))).all()


@quick
@given(sequences_of_tokens, st.integers(1, 12))
def test_every_sequence_is_in_exactly_one_tree_and_in_order(sequences, max_tokens):
    trees = pack_trees(sequences, max_tokens=max_tokens)
    assert [m for members, _ in trees for m in members] == list(range(len(sequences)))
    for members, tree in trees:
        assert [tree.token_ids[path].tolist() for path in tree.paths] == [sequences[m] for m in members]


@quick
@given(sequences_of_tokens, st.integers(1, 12))
def test_no_tree_exceeds_the_limit_unless_one_sequence_does(sequences, max_tokens):
    for members, tree in pack_trees(sequences, max_tokens=max_tokens):
        assert len(tree) <= max_tokens or (len({tuple(sequences[m]) for m in members}) == 1)


@quick
@given(sequences_of_tokens, st.integers(1, 12))
def test_a_tree_is_closed_only_when_the_next_sequence_does_not_fit(sequences, max_tokens):
    trees = pack_trees(sequences, max_tokens=max_tokens)
    for (members, _), (following, _) in pairwise(trees):
        together = one_tree([sequences[m] for m in (*members, following[0])])
        assert len(together) > max_tokens


def test_no_sequences_make_no_trees():
    assert pack_trees([], max_tokens=4) == []


# --- micro-batches ---


@quick
@given(st.composite(sequences_with_masks)(), st.integers(1, 12))
def test_every_action_is_in_exactly_one_micro_batch(data, max_tokens):
    sequences, masks = data
    expected = [(i, int(p)) for i, mask in enumerate(masks) for p in np.flatnonzero(mask)]
    found: list[tuple[int, int]] = []
    for micro in micro_batches(sequences, masks, max_tokens=max_tokens):
        found += list(zip(micro.owners.tolist(), micro.places.tolist(), strict=True))
        assert set(micro.owners.tolist()) <= set(micro.members)
    assert found == expected


@quick
@given(st.composite(sequences_with_masks)(), st.integers(1, 12))
def test_an_action_is_predicted_from_all_tokens_before_it(data, max_tokens):
    sequences, masks = data
    for micro in micro_batches(sequences, masks, max_tokens=max_tokens):
        columns = (micro.states, micro.targets, micro.owners, micro.places)
        for state, target, owner, place in zip(*(c.tolist() for c in columns), strict=True):
            assert target == sequences[owner][place]
            seen, node = [], state
            while node >= 0:
                seen.append(int(micro.tree.token_ids[node]))
                node = int(micro.tree.parents[node])
            assert seen[::-1] == sequences[owner][:place].tolist()


def test_the_same_tokens_with_the_same_actions_are_packed_once():
    sequences = [np.array([1, 2, 3], dtype=np.int32), np.array([1, 2, 4], dtype=np.int32)]
    masks = [np.array([False, True, True]), np.array([False, False, True])]
    first = micro_batches(sequences, masks, max_tokens=8)
    again = micro_batches([s.astype(np.int64) for s in sequences], [m.copy() for m in masks], max_tokens=8)
    assert again is first
    other_tokens = micro_batches(sequences[::-1], masks, max_tokens=8)
    other_actions = micro_batches(sequences, [masks[0], ~masks[1] & masks[0]], max_tokens=8)
    other_size = micro_batches(sequences, masks, max_tokens=3)
    assert other_tokens[0].targets.tolist() == [2, 4, 3]
    assert other_actions[0].targets.tolist() == [2, 3, 2]
    assert [m.members for m in other_size] == [(0,), (1,)]


def test_an_action_at_the_very_start_is_refused():
    with pytest.raises(AssertionError):
        list(micro_batches([np.array([1, 2])], [np.array([True, True])], max_tokens=4))


# --- Batch ---


def scored_of(lengths: list[int], *, num_prompt: int = 1) -> list[ScoredRollout]:
    """One rollout of each length, of prompts p0, p1, ..., whose teacher gives -2 everywhere."""
    items = [rollout([i] * n, num_prompt, prompt=prompt(f"p{i}")) for i, n in enumerate(lengths)]
    return [scored(item, [-2.0] * item.num_actions) for item in items]


@quick
@given(st.lists(st.integers(2, 7), min_size=1, max_size=5), st.integers(0, 99))
def test_flatten_undoes_padded(lengths, seed):
    batch, _ = pack(scored_of(lengths), logprob_floor=-50.0)
    flat = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    padded = batch.padded(flat)
    assert padded.shape == (len(lengths), max(lengths))
    assert torch.equal(batch.flatten(padded), flat)
    for row, length in zip(padded, lengths, strict=True):
        assert not row[length:].any()


def test_padding_of_a_mask_is_false():
    batch, _ = pack(scored_of([4, 2]), logprob_floor=-50.0)
    assert batch.padded(batch.loss_mask).tolist() == [[False, True, True, True], [False, True, False, False]]


def test_offsets_say_where_each_rollout_starts_and_the_last_one_ends():
    batch, _ = pack(scored_of([4, 2, 3]), logprob_floor=-50.0)
    assert batch.offsets == [0, 4, 6, 9]
    for i, (a, b) in enumerate(pairwise(batch.offsets)):
        assert batch.token_ids[a:b].tolist() == [i] * (b - a)


def test_pack_keeps_every_token_with_its_own_figures():
    first = rollout([7, 8, 9], 2, prompt=prompt("a", teacher="t1"), logprobs=[-0.25])
    second = rollout([7, 5, 6, 4], 1, prompt=prompt("b", teacher="t2"), sample=3, logprobs=[-1.0, -2.0, -3.0])
    batch, counts = pack([scored(first, [-0.5]), scored(second, [-1.5, -2.5, -3.5])], logprob_floor=-50.0)
    assert batch.rollout_ids == ("a/0", "b/3")
    assert batch.teachers == ("t1", "t2")
    assert batch.lengths.tolist() == [3, 4]
    assert batch.token_ids.tolist() == [7, 8, 9, 7, 5, 6, 4]
    assert batch.loss_mask.tolist() == [False, False, True, False, True, True, True]
    assert batch.rollout_logprobs.tolist() == [0, 0, -0.25, 0, -1, -2, -3]
    assert batch.teacher_logprobs.tolist() == [0, 0, -0.5, 0, -1.5, -2.5, -3.5]
    assert batch.rewards.tolist() == [0.5, 0.5]
    assert batch.teacher_parts is None
    assert batch.advantages is None
    assert len(batch) == 2
    assert counts == {"dropped": 0, "floored": 0}


def test_samples_of_one_prompt_under_one_teacher_are_a_group():
    items = [("a", "t"), ("b", "t"), ("a", "t"), ("a", "u")]
    rollouts = [rollout([1, 2], 1, prompt=prompt(p, teacher=t), sample=i) for i, (p, t) in enumerate(items)]
    batch, _ = pack([scored(r, [-1.0]) for r in rollouts], logprob_floor=-50.0)
    groups = batch.group_ids.tolist()
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3


def test_pack_drops_failed_scores_and_counts_them():
    good, bad, other = scored_of([3, 4, 2])
    failed = ScoredRollout(bad.rollout, FailedScore("t", "too long"))
    batch, counts = pack([good, failed, other], logprob_floor=-50.0)
    assert batch.rollout_ids == ("p0/0", "p2/0")
    assert batch.token_ids.tolist() == [0, 0, 0, 2, 2]
    assert counts == {"dropped": 1, "floored": 0}


def test_pack_drops_rollouts_without_an_action():
    silent = rollout([1, 2], 2, prompt=prompt("silent"))
    [good] = scored_of([3])
    batch, counts = pack([scored(silent, []), good], logprob_floor=-50.0)
    assert batch.rollout_ids == ("p0/0",)
    assert counts["dropped"] == 1


def test_pack_of_nothing_but_failures_says_why():
    failed = [
        ScoredRollout(s.rollout, FailedScore("t", reason))
        for s, reason in zip(scored_of([3, 2]), ("too long", "server gone"), strict=True)
    ]
    with pytest.raises(ScoreError, match="none of 2 rollouts can be trained on: server gone; too long"):
        pack(failed, logprob_floor=-50.0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_an_error_that_names_the_rollout_and_the_teacher(poison):
    good, other = scored_of([3, 3])
    bad = scored(other.rollout, [-1.0, poison])
    message = r"rollout 'p1/0': 1 of 2 log-probabilities from teacher 't' are NaN or \+infinity"
    with pytest.raises(ScoreError, match=message):
        pack([good, bad], logprob_floor=-50.0)


def test_a_ruled_out_token_is_no_fault_and_is_not_counted_as_one():
    [item] = scored_of([4])
    bad = scored(item.rollout, [float("-inf"), float("nan"), -1.0])
    with pytest.raises(ScoreError, match="1 of 3 log-probabilities from teacher"):
        pack([bad], logprob_floor=-50.0)


def test_scores_that_are_no_numbers_off_the_mask_do_not_matter():
    [item] = scored_of([3])
    spread = np.array([np.nan, -1.0, -2.0], dtype=np.float32)
    batch, _ = pack([ScoredRollout(item.rollout, type(item.score)("t", spread))], logprob_floor=-50.0)
    assert batch.teacher_logprobs.tolist() == [0.0, -1.0, -2.0]


def test_pack_raises_teacher_logprobs_to_the_floor_and_counts_them():
    [item] = scored_of([5])
    batch, counts = pack([scored(item.rollout, [-9.0, -10.0, -11.0, float("-inf")])], logprob_floor=-10.0)
    assert batch.teacher_logprobs.tolist() == [0.0, -9.0, -10.0, -10.0, -10.0]
    assert counts == {"dropped": 0, "floored": 2}


def test_a_rollout_without_a_verdict_has_no_reward():
    item = replace(scored_of([2])[0].rollout, reward=None)
    batch, _ = pack([scored(item, [-1.0])], logprob_floor=-50.0)
    assert torch.isnan(batch.rewards).tolist() == [True]


def test_hidden_scores_are_kept_a_rollout_at_a_time():
    items = scored_of([3, 4])
    hidden = [np.full((s.rollout.num_actions, 2), i, dtype=np.float32) for i, s in enumerate(items)]
    full = [
        ScoredRollout(s.rollout, HiddenScore("t", s.score.logprobs.copy(), (HiddenPart("t", 1.0, h),)))  # type: ignore[union-attr]  # none failed
        for s, h in zip(items, hidden, strict=True)
    ]
    batch, _ = pack(full, logprob_floor=-50.0)
    assert batch.teacher_parts is not None
    assert [[part.hidden.shape for part in parts] for parts in batch.teacher_parts] == [[(2, 2)], [(3, 2)]]
    assert [float(parts[0].hidden[0, 0]) for parts in batch.teacher_parts] == [0.0, 1.0]


def test_a_score_that_is_shorter_than_its_rollout_cannot_be_made():
    [item] = scored_of([4])
    with pytest.raises(AssertionError, match="p0/0"):
        ScoredRollout(item.rollout, type(item.score)("t", np.zeros(3, dtype=np.float32)))


def test_records_cannot_be_written_to():
    [item] = scored_of([3])
    with pytest.raises(ValueError, match="read-only"):
        item.rollout.token_ids[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        item.score.logprobs[0] = 5  # type: ignore[union-attr]  # it did not fail


def test_a_batch_counts_its_rollouts():
    batch, _ = pack(scored_of([2, 2, 5]), logprob_floor=-50.0)
    assert isinstance(batch, Batch)
    assert len(batch) == 3
