"""Attention of packed trees and of growing rows against attention with a dense mask, and linear layers against peft's."""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import SOUND, network_of
from factories import save_toy
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
)

from opd.errors import ModelError
from opd.models.architecture import Reach, reach_of
from opd.models.attention import TreePlan, own_attention, tiles_of, use_plans
from opd.models.kv_cache import KVCache
from opd.models.linear import few_rows, fuse_adapters, merged
from opd.models.network import Network
from opd.models.packing import TokenTree, pack_trees

quick = settings(max_examples=25)
sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=150), min_size=1, max_size=6)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}


def one_tree(tokens: list[list[int]]) -> TokenTree:
    [(_, tree)] = pack_trees(tokens, max_tokens=10**6)
    return tree


def dense(tree: TokenTree, query: Tensor, key: Tensor, value: Tensor, scale: float, reach: Reach | None) -> Tensor:
    """Attention written out, key heads repeated."""
    visible = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for path in tree.paths:
        for at, node in enumerate(path):
            first = 0
            if reach is not None:
                first = at - at % reach.window if reach.in_chunks else max(0, at - reach.window + 1)
            visible[node, path[first : at + 1]] = True
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


REACHES = [None, Reach(1), Reach(7), Reach(70), Reach(200), Reach(16, in_chunks=True), Reach(100, in_chunks=True)]


@settings(max_examples=60)
@given(sequences, st.sampled_from([(1, 1), (2, 2), (2, 6)]), st.sampled_from(REACHES), st.integers(0, 99))
def test_a_packed_tree_attends_as_with_a_dense_mask_and_has_its_gradients(tokens, heads, reach, seed):
    tree, (few, many) = one_tree(tokens), heads
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given_ = [normal(1, n, len(tree), 4).requires_grad_() for n in (many, few, few)]
    plan = TreePlan(tree, device=torch.device("cpu"))
    found, expected = plan.attend(0, *given_, 0.3, reach), dense(tree, *given_, 0.3, reach)
    assert found.shape == expected.shape == (1, len(tree), many, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = normal(*found.shape)
    for mine, other in zip(*(torch.autograd.grad((x * weights).sum(), given_) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_what_tiles_keep_for_their_gradient_does_not_grow_with_what_they_see(monkeypatch: pytest.MonkeyPatch):
    """Wide groups attend once more for their gradient, which stays the same."""
    tree = one_tree([[1] * 300 + [2] * 300, [1] * 300 + [3] * 300])
    given_ = [torch.randn(1, 2, len(tree), 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    plan = TreePlan(tree, device=torch.device("cpu"))
    found, kept = [], []
    for wide in (10**6, 64):
        monkeypatch.setattr("opd.models.attention._WIDE", wide)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            out = plan.attend(0, *given_, None, None)
        found.append((out, *torch.autograd.grad(out.cos().sum(), given_)))
        kept.append(sum(sizes))
    for kept_all, again in zip(*found, strict=True):
        assert torch.equal(kept_all, again)
    assert kept[1] < kept[0] / 2


def test_a_shared_prefix_keeps_its_gradient_in_half_precision():
    """Three hundred branches see the prefix: summed in bfloat16 one after another, its gradient would be a twentieth off."""
    tree = one_tree([[1] * 8 + [2 + branch] * 64 for branch in range(300)])
    # one for both: mixed precision computes in another dtype than the weights'
    plan = TreePlan(tree, device=torch.device("cpu"))
    torch.manual_seed(0)
    numbers = [torch.randn(1, 2, len(tree), 8).bfloat16() for _ in range(3)]
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        mine = [x.to(dtype).requires_grad_() for x in numbers]
        out = plan.attend(0, *mine, None, None)
        gradients.append(torch.autograd.grad(out.sum(), mine[2])[0][:, :, :8].double())
    half, exact = gradients
    assert float((half - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("name", ["softcap", "indices", "sinks"])
def test_attention_that_a_plan_cannot_make_is_refused(name: str):
    attend = AttentionInterface()["opd"]
    states = torch.randn(1, 2, 3, 4)
    with pytest.raises(ModelError, match=f"Linear attends with '{name}', which packed passes do not do"):
        attend(torch.nn.Linear(1, 1), states, states, states, None, **{name: torch.ones(1)})


def test_a_window_keeps_the_tiles_of_a_long_sequence_small():
    """Of 4,000 tokens a tile sees its window and itself, not all that came before."""
    tree = one_tree([list(range(4000))])
    wide, narrow = (tiles_of(tree, size=64, reach=reach) for reach in (None, Reach(128)))
    assert max(group.keys.shape[1] for group in wide.groups) == 4000
    assert max(group.keys.shape[1] for group in narrow.groups) == 128 + 63


def toy_network(tmp_path: Path) -> Network:
    return Network(AutoModelForCausalLM.from_pretrained(save_toy(tmp_path / "toy", 0)).eval(), None, "toy")


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [8, 200])
def test_rows_that_begin_grow_split_and_end_have_the_states_of_their_tokens(tmp_path, max_tokens):
    network = toy_network(tmp_path)
    texts = [[1, 2, 3], [1, 2, 3, 4, 5, 6], [7]]
    rows = KVCache(network.device)
    hidden = network.prefill(texts, rows, max_tokens=max_tokens)
    rng = np.random.default_rng(0)
    for step in range(140):  # past what buffers begin with
        for text, state in zip(texts, hidden, strict=True):
            plain = network._backbone(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
            torch.testing.assert_close(state, plain, rtol=0, atol=2e-5)
        if step == 2:
            rows.copy(1)
            texts.append(list(texts[1]))
        if step in (4, 6):
            rows.drop(0)
            texts[0] = texts[-1]
            texts.pop()
        if step == 8:
            texts.append([9, 8])
            network.prefill([[9, 8]], rows, max_tokens=max_tokens)
        tokens = rng.integers(0, 200, len(texts)).tolist()
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        assert rows.lengths == [len(text) - 1 for text in texts]
        hidden = network.decode(tokens, rows)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 9}),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "use_sliding_window": True}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 40}),
    ],
)  # fmt: skip
def test_rows_in_a_window_keep_what_it_needs_alone(kind, options):
    """Rows of very different lengths, beyond the window, through all that happens to rows, against the model's own pass."""
    network = network_of(kind, {**SOUND[kind], **options, "max_position_embeddings": 1024})
    assert network.padded_because is None
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 250, length).tolist() for length in (3, 60, 1, 150)]
    rows = KVCache(network.device)
    hidden = network.prefill(texts, rows, max_tokens=100)
    for step in range(300):
        if step % 7 == 0 or step < 20:
            for text, state in zip(texts, hidden, strict=True):
                with own_attention(network.base):
                    plain = network._backbone(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
                torch.testing.assert_close(state, plain, rtol=0, atol=5e-5)
        if step == 100:
            rows.copy(1)
            texts.append(list(texts[1]))
        if step == 130:
            rows.drop(0)
            texts[0] = texts.pop()
        if step == 160:
            texts.append([9, 8])
            network.prefill([[9, 8]], rows, max_tokens=100)
        tokens = rng.integers(0, 200, len(texts)).tolist()
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        hidden = network.decode(tokens, rows)
    windowed = [layer for layer in (0, 1) if reach_of(network.base.config, layer) is not None]
    assert windowed
    for layer in (0, 1):
        room = rows._buffers[layer, "key"].shape[2]
        assert (room < 200) if layer in windowed else (room >= 450)


def adapted(tmp_path: Path, **options: bool) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(save_toy(tmp_path / "toy", 0)).double()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.2
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_fused_adapters_have_the_outputs_and_gradients_of_pefts(tmp_path, options):
    plain = adapted(tmp_path, **options)
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    outputs = []
    for model in (plain, fused):
        logits = model(input_ids=ids).logits
        logits.sin().sum().backward()
        outputs.append(logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    for (name, mine), (_, other) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        if mine.requires_grad:
            assert float(other.grad.abs().max()) > 0, name
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_merged_weights_speak_as_the_adapter_and_are_gone_afterwards(tmp_path, options):
    model = adapted(tmp_path, **options)
    fuse_adapters(model)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before, weights = model(input_ids=ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    with merged(model):
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-10)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    with pytest.raises(KeyError, match="what a caller raised"), merged(model):
        raise KeyError("what a caller raised")
    assert torch.equal(model(input_ids=ids).logits, before)
    with model.disable_adapter(), merged(model):
        bare = model(input_ids=ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(bare, model(input_ids=ids).logits, rtol=0, atol=1e-10)
    assert float((bare - before).abs().max()) > 1e-3


def test_merged_weights_are_used_with_gradients_until_their_parts_change(tmp_path):
    plain = adapted(tmp_path)
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    layers = [m for m in fused.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 14

    def sums_in_use() -> int:
        """Layers whose gradient is taken through the sum."""
        made = [layer.opd_whole._sum for layer in layers]
        used: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: used.add(t.data_ptr()) or t, lambda t: t):
            fused(input_ids=ids)
        return sum(one is not None and one.data_ptr() in used for one in made)

    assert sums_in_use() == 0  # none was made
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (plain, fused)]
    for step in range(3):
        with torch.no_grad(), merged(fused):
            fused(input_ids=ids)
        assert sums_in_use() == len(layers)
        buffers = [layer.opd_whole._sum.data_ptr() for layer in layers]
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            model(input_ids=ids).logits.sin().sum().backward()
        for (name, mine), (_, other) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
            if mine.requires_grad:
                torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-9, msg=f"{name}, step {step}")
        for optimizer in optimizers:
            optimizer.step()
        assert sums_in_use() == 0  # the update changed what they were made of
        with torch.no_grad(), merged(fused):
            assert buffers == [layer.opd_whole._sum.data_ptr() for layer in layers]
    fused.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fused.double().set_adapter("other")
    assert sums_in_use() == 0  # nor are they another adapter's
    with fused.disable_adapter():
        assert sums_in_use() == 0


def test_a_sum_that_is_made_anew_before_its_gradient_is_noticed(tmp_path):
    model = adapted(tmp_path)
    fuse_adapters(model)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad(), merged(model):
        model(input_ids=ids)
    logits = model(input_ids=ids).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        with merged(model):
            model(input_ids=ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@torch.no_grad()
def test_adapters_of_another_tuner_speak_while_merged_too(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_toy(tmp_path / "toy", 0)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: the parameter's layer could be adapted as a whole
        model = get_peft_model(base, LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = model(input_ids=ids).logits
    with model.disable_adapter():
        assert float((model(input_ids=ids).logits - before).abs().max()) > 1e-3
    with merged(model):
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_few_rows_come_out_row_by_row():
    weight, x = torch.randn(6, 4), torch.randn(3, 1, 4)
    for together in (True, False):
        found = few_rows(weight, None, x, together=together)
        assert found.is_contiguous() == together
        torch.testing.assert_close(found, x @ weight.T)


@torch.no_grad()
def test_rows_of_attention_lie_together_while_merged(tmp_path):
    model = adapted(tmp_path)
    ids = torch.tensor([[3], [1], [4]])
    seen: dict[str, bool] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.is_contiguous()}))
        for name, layer in model.named_modules()
        if name.endswith("_proj")
    ]
    with merged(model):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    assert all(apart for name, apart in seen.items() if "self_attn" in name)
    assert len([name for name in seen if "self_attn" in name]) == 8


def test_an_architecture_that_keeps_its_attention_to_itself_says_so():
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    model = FalconForCausalLM(FalconConfig(**sizes, alibi=False))
    assert "FalconForCausalLM does not take another attention" in (use_plans(model) or "")
