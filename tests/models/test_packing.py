"""Packed passes of each architecture against the model's own, in every precision, and the lengths that they are right for."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import FOUND, PADDED, SOUND, WINDOWED, network_of, toy_of
from factories import byte_tokenizer, save_adapter, save_toy, toy_model
from torch import Tensor

from opd.checks.startup import passes_equal_own
from opd.config import ComputeConfig
from opd.models import architecture, attention
from opd.models.architecture import Reach, length_limit, reach_of, reaches_of
from opd.models.loading import load_network
from opd.models.lora import add_adapter
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.models.packing_check import PACKED_WITHIN, PACKING_CAUSES, packed_gaps, settled_passes

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {"max_position_embeddings": 64}
ORIGINAL = {"original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    **ORIGINAL,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", SOUND)
def test_a_model_of_plain_attention_passes_the_packing_check_in_every_precision(kind: str, dtype: torch.dtype):
    gaps = packed_gaps(network_of(kind, SOUND[kind], dtype), gradients=True)
    assert max(gaps.values()) < PACKED_WITHIN / 20, gaps
    assert list(gaps)[-1] == "gradients"
    assert passes_equal_own(kind, gaps).passed


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", FOUND)
def test_a_difference_that_no_config_names_is_found_in_every_precision_and_padded_passes_take_over(
    kind: str, dtype: torch.dtype
):
    options, probe = FOUND[kind]
    network = network_of(kind, options, dtype)
    gaps = packed_gaps(network, gradients=True)
    assert list(gaps)[-1] == probe, gaps
    assert gaps[probe] > 10 * PACKED_WITHIN
    found = passes_equal_own("teacher 'even'", gaps)
    assert not found.passed
    assert found.detail.startswith("this model")
    gaps, because = settled_passes(network, gradients=True)
    assert because == PACKING_CAUSES[probe]
    assert max(gaps.values()) < PACKED_WITHIN / 20, gaps


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", ["lfm2", "granitemoehybrid", "qwen3_5_text"])
def test_numbers_alone_find_state_that_leaks_in_every_precision(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Were no config to say so: another name for the layers, an architecture of tomorrow."""
    monkeypatch.setattr(attention, "unpackable", lambda model: None)
    gaps = packed_gaps(network_of(kind, PADDED[kind][0], dtype), gradients=False)
    assert list(gaps)[-1] == "several sequences", gaps
    assert gaps["several sequences"] > 10 * PACKED_WITHIN


@pytest.mark.parametrize("kind", ["nanochat", "granite", "minicpm3", "cohere"])
def test_a_head_that_is_taken_for_a_plain_product_fails_the_check(kind: str):
    network = network_of(kind, SOUND[kind])
    network._scale, network.softcap = 1.0, None
    assert list(packed_gaps(network, gradients=False))[-1] == "head"


# --- the check itself ---


def broken(network: Network, monkeypatch: pytest.MonkeyPatch, change: Any) -> dict[str, float]:
    monkeypatch.setattr(network, "hidden_states", lambda tree, real=network.hidden_states: change(real, tree))
    return packed_gaps(network, gradients=True)


def test_a_gradient_that_is_lost_on_the_way_fails_the_check(monkeypatch: pytest.MonkeyPatch):
    """The values are right, and the half of the gradient is gone."""

    def halved(real: Any, tree: Any) -> Tensor:
        hidden = real(tree)
        return 0.5 * hidden + 0.5 * hidden.detach()

    gaps = broken(network_of("qwen3", SOUND["qwen3"]), monkeypatch, halved)
    assert list(gaps)[-1] == "gradients"
    assert gaps["gradients"] == pytest.approx(0.5, abs=1e-3)
    assert not passes_equal_own("the student", gaps).passed


def test_what_depends_on_the_order_of_a_pass_fails_the_check(monkeypatch: pytest.MonkeyPatch):
    def by_order(real: Any, tree: Any) -> Tensor:
        return real(tree) + 0.1 * float(len(tree.paths) > 1 and len(tree.paths[0]) < len(tree.paths[-1]))

    gaps = broken(network_of("qwen3", SOUND["qwen3"]), monkeypatch, by_order)
    assert list(gaps)[-1] == "another order"


@pytest.mark.parametrize("bad", ["P", "."])
def test_a_difference_that_is_no_number_fails_the_check(bad: str):
    tokenizer = byte_tokenizer()
    network = Network(toy_model(), tokenizer, "toy")
    [token] = tokenizer(bad)["input_ids"]
    with torch.no_grad():
        network.base.get_input_embeddings().weight[token] = torch.nan
    gaps = packed_gaps(network, gradients=False)
    assert np.isnan(list(gaps.values())[-1])
    assert not passes_equal_own("toy", gaps).passed


@pytest.mark.parametrize("dtype", PRECISIONS[:2], ids=str)
def test_an_adapter_is_checked_as_it_speaks_and_nothing_stays_behind(tmp_path: Path, dtype: torch.dtype):
    base = save_toy(tmp_path / "base", 0)
    network = load_network(base, ComputeConfig(device="cpu", dtype=str(dtype).removeprefix("torch.")))
    add_adapter(network, save_adapter(tmp_path / "adapter", base), teacher="t", name="teacher0")
    network.activate("teacher0")
    before = {name: (p.clone(), p.dtype) for name, p in network.model.named_parameters()}
    [(_, tree)] = pack_trees([[1, 2, 3], [1, 2, 4]], max_tokens=10)
    states = network.hidden_states(tree)
    assert max(packed_gaps(network, gradients=True).values()) < PACKED_WITHIN / 20
    assert torch.equal(network.hidden_states(tree), states)
    for name, p in network.model.named_parameters():
        assert p.dtype == before[name][1]
        assert torch.equal(p, before[name][0])
        assert p.grad is None
    assert network.base.config._attn_implementation == "opd"


def test_an_adapter_that_breaks_packed_passes_is_found_beside_a_sound_base(tmp_path: Path):
    base = save_toy(tmp_path / "base", 0)
    network = load_network(base, ComputeConfig(device="cpu"))
    add_adapter(network, save_adapter(tmp_path / "adapter", base), teacher="t", name="teacher0")
    layer = next(m for n, m in network.model.named_modules() if n.endswith("up_proj") and hasattr(m, "lora_A"))
    plain = layer.forward
    # what an adapter with state would do
    layer.forward = lambda x: plain(x) + 0.0 * x.sum() + (
        0.0 if layer.disable_adapters else plain(x).cumsum(1) * 0.1
    )  # fmt: skip
    network.activate(None)
    assert passes_equal_own("base", packed_gaps(network, gradients=False)).passed
    network.activate("teacher0")
    assert not passes_equal_own("adapter", packed_gaps(network, gradients=False)).passed


@pytest.mark.parametrize("context", [1, 2, 5, 16])
def test_a_model_of_a_very_short_context_can_be_checked(context: int):
    network = Network(toy_model(max_context=context), byte_tokenizer(), "toy")
    assert max(packed_gaps(network, gradients=True).values()) < PACKED_WITHIN / 20


# --- lengths ---


def config_of(kind: str, **options: Any) -> Any:
    return toy_of(kind, {**SOUND.get(kind, {}), **options}).config


@pytest.mark.parametrize(
    ("kind", "options", "tokens", "cause"),
    [
        ("llama", {}, 256, ""),
        ("phi3", {"rope_parameters": LONGROPE, **ORIGINAL}, 64, "its rope ('longrope') changes beyond 64 tokens"),
        ("llama", {"rope_parameters": LONGROPE}, 64, "its rope ('longrope') changes beyond 64 tokens"),
        ("llama", {"rope_parameters": LONGROPE, **SHORT}, 64, "its rope ('longrope') changes beyond 64 tokens"),
        ("llama", {"rope_parameters": DYNAMIC}, 256, "its rope ('dynamic') changes beyond 256 tokens"),
        ("llama", {"rope_parameters": {**DYNAMIC, "rope_type": "linear"}}, 256, ""),
        ("mistral", {"sliding_window": 32}, 256, ""),
    ],
)  # fmt: skip
def test_the_longest_sequence_that_may_be_packed_says_why(kind: str, options: dict[str, Any], tokens: int, cause: str):
    limit = length_limit(config_of(kind, **options))
    assert limit is not None
    assert (limit.tokens, limit.cause) == (tokens, cause)


@pytest.mark.parametrize(
    ("facts", "window", "reaches"),
    [
        ({"sliding_window": 8}, None, [Reach(8), Reach(8)]),
        ({"sliding_window": None}, None, [None, None]),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, None, [None, Reach(8)]),
        ({"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}, None, [None, None]),
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16}, None, [Reach(16, True), None]),
        ({}, 8, [Reach(8), Reach(8)]),
    ],
)  # fmt: skip
def test_how_far_back_a_layer_sees(facts: dict[str, Any], window: int | None, reaches: list[Reach | None]):
    assert [reach_of(Said(**facts), layer, window) for layer in (0, 1)] == reaches
    if window is None:
        assert reaches_of(Said(**facts)) == set(reaches) - {None}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_are_right_in_packed_passes_and_checked_beyond_their_end(kind: str, dtype: torch.dtype):
    network = network_of(kind, WINDOWED[kind], dtype)
    gaps, because = settled_passes(network, gradients=True)
    assert because is None
    assert max(gaps.values()) < PACKED_WITHIN / 20, gaps
    assert gaps["windows"] == 0.0
    assert network.max_context == 256


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_wide_window_is_narrowed_for_the_check_and_stays_as_it_was(kind: str, monkeypatch: pytest.MonkeyPatch):
    network = network_of(kind, {**WINDOWED[kind], "sliding_window": 200})
    states = network.hidden_states(pack_trees([[1, 2, 3] * 80], max_tokens=300)[0][1])
    assert max(packed_gaps(network, gradients=True).values()) < PACKED_WITHIN / 20
    assert torch.equal(network.hidden_states(pack_trees([[1, 2, 3] * 80], max_tokens=300)[0][1]), states)
    # what the check is for: attention that sees as if there were no window, within 32 tokens of 200
    monkeypatch.setattr(attention, "reach_of", lambda config, layer, window=None: None)
    assert list(packed_gaps(network, gradients=False))[-1] == "one sequence"


def test_a_window_that_only_the_config_has_is_found():
    """Llama has no windows, whatever a config says; transformers' cache believes the config, so it cannot sample from it."""
    model = toy_of("llama", SOUND["llama"])
    model.config.sliding_window = 100
    gaps, because = settled_passes(Network(model, byte_tokenizer(), "toy"), gradients=False)
    assert because == PACKING_CAUSES["windows"]
    assert list(gaps)[-1] == "grown rows"


class Said:
    """A config that is not transformers' own."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)

    def get_text_config(self) -> "Said":
        return self


@pytest.mark.parametrize(
    ("facts", "tokens"),
    [
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 128}, 128),
        ({"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}}, 64),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, 1000),
    ],
)
def test_a_limit_is_found_wherever_a_config_keeps_it(facts: dict[str, Any], tokens: int):
    limit = length_limit(Said(max_position_embeddings=1000, **facts))
    assert limit is not None
    assert limit.tokens == tokens


@pytest.mark.parametrize(
    ("kind", "rope"), [("phi3", LONGROPE), ("llama", LONGROPE), ("llama", DYNAMIC)], ids=["phi3", "llama", "dynamic"]
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_short_sequence_packed_with_a_long_one_keeps_its_numbers_up_to_the_limit(
    kind: str, rope: dict[str, Any], order: int
):
    """And one token beyond it both orders are wrong, which is why there is a limit."""
    options = {**SOUND[kind], "rope_parameters": rope, **(SHORT if rope is DYNAMIC else {})}
    network = network_of(kind, {**options, **(ORIGINAL if kind == "phi3" else {})})
    assert network.max_context == 64
    short, rng = [5, 6, 7, 8, 9], np.random.default_rng(0)
    with torch.no_grad():
        plain = network.base(input_ids=torch.tensor([short])).logits[0]
    for length, right in ((64, True), (65, False)):
        sequences = [short, rng.integers(0, 250, length).tolist()][::order]
        [(_, tree)] = pack_trees(sequences, max_tokens=200)
        with torch.no_grad():
            hidden = network.hidden_states(tree)[torch.from_numpy(tree.paths[sequences.index(short)])]
            gap = float((hidden @ network.head_weight().T - plain).abs().max())
        assert (gap < 1e-4) is right, (length, gap)
    assert passes_equal_own(kind, packed_gaps(network, gradients=True)).passed


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_a_limit_beyond_the_change_of_a_rope_fails_the_check(kind: str, monkeypatch: pytest.MonkeyPatch):
    """A rope that no config key names: the probe at the end of the limit finds it."""
    monkeypatch.setattr(architecture, "_rope_limits", lambda text: ())
    network = network_of(kind, {**SOUND[kind], "rope_parameters": LONGROPE, **(ORIGINAL if kind == "phi3" else {})})
    assert network.max_context == 256
    gaps = packed_gaps(network, gradients=False)
    assert list(gaps)[-1] == "distant positions"
    found = passes_equal_own("the student", gaps)
    assert found.detail.startswith("in this model the longest sequence of a pass changes the others")


def test_state_that_one_pass_leaves_for_the_next_fails_the_check(monkeypatch: pytest.MonkeyPatch):
    network = network_of("qwen3", SOUND["qwen3"])
    rope = network.base.base_model.rotary_emb
    real = copy.deepcopy(rope).forward
    seen = [0]

    def grows(x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = real(x, position_ids)
        scale = 1.1 if seen[0] > 1 else 1.0
        seen[0] += int(position_ids.max() > 200)  # once packed, once alone
        return scale * cos, scale * sin

    monkeypatch.setattr(rope, "forward", grows)
    gaps = packed_gaps(network, gradients=False)
    assert list(gaps)[-1] == "next pass"


def test_a_soft_cap_of_small_logits_is_found_by_the_head(monkeypatch: pytest.MonkeyPatch):
    """At logits of a hundredth a cap of 30 bends nothing that a forward pass would show."""
    network = Network(toy_of("nanochat", {}, scale=0.01), byte_tokenizer(), "nanochat")
    network.softcap = None
    assert list(packed_gaps(network, gradients=False))[-1] == "head"
