"""Padded passes: models whose layers keep state, or attend in ways of their own, against their own forward pass."""

import re

import numpy as np
import pytest
import torch
from architectures import FOUND, NO_CACHE, PADDED, network_of
from torch import Tensor

from opd.checks.startup import passes_equal_own
from opd.errors import ModelError
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.models.packing_check import PACKED_WITHIN, settled_passes
from opd.models.padded import rows_of

PRECISIONS = (torch.float32, torch.bfloat16)
SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8], [5, 6, 7, 20, 21], [30], [5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", PADDED)
def test_passes_equal_the_models_own_with_gradients_and_the_cause_is_named(kind: str, dtype: torch.dtype):
    options, cause = PADDED[kind]
    found = settled_passes(network_of(kind, options, dtype), gradients=True)
    assert list(found.gaps) == [
        "head", "one sequence", "several sequences", "another order", "next pass", "grown rows", "gradients"
    ]  # fmt: skip
    assert max(found.gaps.values()) < PACKED_WITHIN / 20, found.gaps
    said = passes_equal_own("the student", *found)
    assert said.passed
    assert re.search(cause, said.detail)


def test_a_sequence_within_another_needs_no_row_and_every_node_stands_at_its_position():
    [(_, tree)] = pack_trees(SEQUENCES, max_tokens=100)
    token_ids, row_of = rows_of(tree)
    assert token_ids.tolist() == [[5, 6, 7, 8, 9, 10], [5, 6, 7, 20, 21, 0], [30, 0, 0, 0, 0, 0]]
    assert token_ids[row_of, tree.positions].tolist() == tree.token_ids.tolist()


def test_padding_counts_as_tokens_of_a_pass():
    sizes = [6, 4, 5, 1, 6]
    for most in (1, 6, 12, 18, 100):
        trees = pack_trees(SEQUENCES, max_tokens=most, padded=True)
        assert [i for members, _ in trees for i in members] == list(range(5))
        for members, _ in trees:
            assert len(members) * max(sizes[i] for i in members) <= most or len(members) == 1
    assert len(pack_trees(SEQUENCES, max_tokens=12, padded=True)) == 3
    assert len(pack_trees(SEQUENCES, max_tokens=12)) == 1  # packed, they have 9 tokens


def own(network: Network, sequence: list[int]) -> Tensor:
    with torch.no_grad():
        return network.base(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", [*PADDED, *FOUND])
def test_rows_that_are_copied_and_dropped_while_they_grow_keep_their_numbers(kind: str):
    options, _ = (PADDED | FOUND)[kind]
    network = network_of(kind, options)
    network.pad("of the test")
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]
    cache = network.new_cache()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        hidden = network.prefill(texts, cache, max_tokens=8)
        for step in range(6):
            if step == 1:
                cache.copy(0)
                texts.append(texts[0])
                hidden = torch.cat([hidden, hidden[:1]])
            if step == 3:
                cache.drop(1)
                texts[1] = texts.pop()
                hidden = torch.cat([hidden[:1], hidden[-1:], hidden[2:-1]])
            if step == 4:
                texts += [[3, 4, 5]]
                hidden = torch.cat([hidden, network.prefill(texts[-1:], cache, max_tokens=8)])
            found = network.logits(hidden).log_softmax(-1)
            for text, mine in zip(texts, found, strict=True):
                torch.testing.assert_close(mine, own(network, text), rtol=0, atol=2e-4)
            tokens = rng.integers(0, 250, len(texts)).tolist()
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
            hidden = network.decode(tokens, cache)
    assert len(cache) == len(texts) == 4


def test_a_model_that_returns_no_cache_is_refused_by_that_cause():
    network = network_of("recurrent_gemma", NO_CACHE)
    with pytest.raises(ModelError, match="RecurrentGemmaModel returns no cache, so opd cannot sample from it"):
        settled_passes(network, gradients=False)
