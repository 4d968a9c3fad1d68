"""Padded passes: models whose layers keep state, or attend in ways of their own, against their own forward pass."""

import re

import numpy as np
import pytest
import torch
from architectures import FOUND, NO_CACHE, PADDED, SOUND, WINDOWED, network_of
from own_passes import SEQUENCES, gradients
from torch import Tensor

from opd.checks.startup import passes_equal_own
from opd.config import LoraConfig
from opd.errors import ModelError
from opd.models.lora import add_student_adapter
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.models.packing_check import PACKED_WITHIN, settled_passes
from opd.models.padded import rows_of

PRECISIONS = (torch.float32, torch.bfloat16)


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


HEADS = ("phi", "codegen", "nanochat", "granite", "minicpm3")


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("kind", [*PADDED, *FOUND, *HEADS, *WINDOWED])
def test_every_weight_that_trains_has_the_gradient_of_the_models_own_passes(kind: str, trainable: str):
    if kind in WINDOWED:
        network = network_of(kind, {**WINDOWED[kind], "sliding_window": 3})  # shorter than the sequences
        assert network.padded_because is None
    else:
        network = network_of(kind, SOUND[kind] if kind in HEADS else (PADDED | FOUND)[kind][0])
    if kind in FOUND:
        network.pad("of the test")
    if trainable == "lora":
        add_student_adapter(network, LoraConfig(rank=4), seed=0)
        network.activate("student", trainable=True)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # as after some steps; B is zero at first
            for name, p in network.model.named_parameters():
                if p.requires_grad and "lora_B" in name:
                    p.normal_(0.0, 0.1, generator=generator)
    else:
        network.activate(None, trainable=True)
    mine, theirs = (gradients(network, by_passes=by_passes) for by_passes in (True, False))
    assert len(mine) > 4
    assert sum(bool(g.any()) for g in theirs.values()) > len(theirs) / 2
    largest = max(float(g.norm()) for g in theirs.values())
    for name, wanted in theirs.items():
        assert float((mine[name] - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-6 * largest, name


def test_a_packed_pass_that_fails_makes_way_for_padded_ones(monkeypatch: pytest.MonkeyPatch):
    network = network_of("qwen3", SOUND["qwen3"])

    def fails(self: Network, *args: object) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Network, "_run", fails)
    found = settled_passes(network, gradients=True)
    assert found.padded_because == "a packed pass fails in this model (shapes do not match)"
    assert max(found.gaps.values()) < PACKED_WITHIN / 20
    monkeypatch.setattr(Network, "hidden_states", fails)
    with pytest.raises(
        ModelError, match=r"model 'qwen3': its own code fails .* \(shapes do not match\); use another model"
    ):
        settled_passes(network, gradients=True)
