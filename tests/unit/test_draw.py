"""Drawing by inversion against the distribution function written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.objectives.draw import invert

quick = settings(max_examples=40)


@quick
@given(st.integers(1, 700), st.integers(0, 99), st.floats(0.1, 8.0))
def test_a_draw_is_the_first_token_at_which_the_distribution_function_exceeds_its_number(vocab, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=generator) * spread
    owners = torch.tensor([0, 2, 2, 1, 0])
    uniforms = torch.rand(5, generator=generator, dtype=torch.float64)
    tokens, logprobs = invert(logits, owners, uniforms)
    exact = torch.log_softmax(logits.double(), -1)
    for owner, uniform, token, logprob in zip(owners.tolist(), uniforms.tolist(), tokens, logprobs, strict=True):
        cdf = exact[owner].exp().cumsum(-1)
        assert (float(cdf[token - 1]) if token else 0.0) <= uniform + 1e-6
        assert float(cdf[token]) > uniform - 1e-6
        assert abs(logprob - float(exact[owner, token])) < 1e-5


def test_no_token_of_probability_zero_is_drawn_at_either_end():
    logits = torch.full((1, 600), -torch.inf)
    logits[0, [5, 300]] = torch.tensor([0.0, 1.0])
    # 1.0: what the rounding of a product with the last numbers below it can come to
    ends = torch.tensor([0.0, 1.0 - 2**-53, 1.0], dtype=torch.float64)
    tokens, logprobs = invert(logits, torch.tensor([0, 0, 0]), ends)
    assert tokens == [5, 300, 300]
    np.testing.assert_allclose(np.exp(logprobs[:2]).sum(), 1.0, rtol=1e-6)


def test_logits_that_lie_column_by_column_are_read_as_they_are():
    logits = torch.randn(4, 513, generator=torch.Generator().manual_seed(0))
    owners, uniforms = torch.arange(4), torch.full((4,), 0.5, dtype=torch.float64)
    assert invert(logits.T.contiguous().T, owners, uniforms) == invert(logits, owners, uniforms)


def test_a_row_that_is_no_distribution_gives_a_token_whose_logprob_says_so():
    logits = torch.zeros(2, 300)
    logits[1, 7] = torch.nan
    tokens, logprobs = invert(logits, torch.tensor([0, 1]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert tokens[0] == 150
    assert 0 <= tokens[1] < 300
    assert math.isnan(logprobs[1])
    assert logprobs[0] == pytest.approx(-math.log(300))


@pytest.mark.parametrize("rare", [2.0**-26, 2.0**-36])
def test_rare_tokens_behind_a_likely_one_keep_their_probability(rare: float):
    """One token of weight 1 and 1,023 of `rare`: float32 would round every sum back to 1, within a block and over blocks."""
    logits = torch.full((1, 1024), math.log(rare), dtype=torch.float32)
    logits[0, 0] = 0.0
    weight = float(logits[0, 1].exp())
    wanted = [1, 17, 255, 256, 700, 1023]
    marks = torch.tensor([1 + (token - 0.5) * weight for token in wanted], dtype=torch.float64) / (1 + 1023 * weight)
    tokens, logprobs = invert(logits, torch.zeros(6, dtype=torch.int64), marks)
    assert tokens == wanted
    assert logprobs == [float(np.float32(math.log(weight / (1 + 1023 * weight))))] * 6  # as float32 holds it
