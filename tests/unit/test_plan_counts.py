"""What a plan counts, beside real models; memory and time, reckoned by hand."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import byte_tokenizer
from peft import LoraConfig, get_peft_model
from planning import H100, SMALL, plan, planned_recipe
from planning import folders as folders
from planning import read_once as read_once
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from opd.config import parse_config
from opd.models.linear import fuse_adapters
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd_plan.devices import GIB
from opd_plan.memory import _tiles, engine_memory, kept_a_token, kv_bytes_here, rank_memory, rank_share
from opd_plan.roofline import driver_s, head_flops, layers_flops, pool_s, sample_s, split_s, update_s
from opd_plan.search import DoesNotFit
from opd_plan.shapes import adapter_parameters, read_shape
from opd_plan.work import work_of

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples/distributed/shapes"


# Counts, beside models that exist


@pytest.mark.parametrize(("name", "count"), [("qwen3-1.7b", 1_720_574_976), ("qwen3-32b", 32_762_123_264)])
def test_the_example_shapes_have_the_published_numbers_of_parameters(name: str, count: int):
    assert read_shape(str(SHAPES / name)).parameters == count


def test_the_demo_student_has_as_many_parameters_as_its_weights(tmp_path: Path):
    LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert read_shape(str(tmp_path)).parameters == 134_515_008


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_model_in_memory(tmp_path: Path, kind: Any, tied: bool):
    config = kind(**SMALL | {"tie_word_embeddings": tied})
    config.save_pretrained(tmp_path)
    model, shape = AutoModelForCausalLM.from_config(config), read_shape(str(tmp_path))
    layers = list(model.model.layers.parameters())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.inside == sum(p.numel() for p in layers)
    assert shape.products == sum(p.numel() for p in layers if p.ndim == 2)
    assert shape.head == model.lm_head.weight.numel()
    adapted = with_adapter(model)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(str(tmp_path), rank=8, target_modules="all-linear") == count


def with_adapter(model: Any) -> Any:
    described = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
        return get_peft_model(model, described, adapter_name="student")


def test_grouped_queries_share_the_keys_and_values_of_a_token():
    # two (keys, values) x 64 layers x 8 key heads x 128 x two bytes
    assert read_shape(str(SHAPES / "qwen3-32b")).kv_bytes(2) == 2 * 64 * 8 * 128 * 2


@pytest.mark.parametrize("tokens", [1, 17])
def test_operations_of_a_pass_are_those_that_torch_counts(tmp_path: Path, tokens: int):
    config = LlamaConfig(**SMALL)
    config._attn_implementation = "eager"
    config.save_pretrained(tmp_path)
    model, shape = AutoModelForCausalLM.from_config(config), read_shape(str(tmp_path))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    # that attention multiplies what it masks too
    assert sum_without_rotations(counted) == layers_flops(shape, tokens, tokens**2) + head_flops(shape, tokens)


def sum_without_rotations(counted: FlopCounterMode) -> int:
    """All but the angles of the positions, which transformers makes with a product."""
    every = counted.get_flop_counts()
    return sum(every["Global"].values()) - sum(sum(v.values()) for k, v in every.items() if k.endswith("rotary_emb"))


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize(("dtype", "trainable"), [("float32", "lora"), ("bfloat16", "lora"), ("float32", "full")])
def test_a_layer_keeps_as_many_bytes_of_a_token_as_the_plan_says(
    folders: dict[str, str], tmp_path: Path, kind: Any, dtype: str, trainable: str
):
    def kept_a_layer(sequences: list[list[int]]) -> float:
        models = [kind(**SMALL | {"num_hidden_layers": n}) for n in (1, 3)]
        kept = [bytes_kept(m, getattr(torch, dtype), trainable, sequences) for m in models]
        return (kept[1] - kept[0]) / 2

    kind(**SMALL).save_pretrained(tmp_path)
    config, shape = planned_recipe(folders, trainable=trainable, compute={"dtype": dtype}), read_shape(str(tmp_path))
    said = kept_a_token(config, shape)
    assert said == pytest.approx(kept_a_layer([np.arange(200).tolist()]) / 200, rel=0.05)
    # of several sequences that see few keys every layer keeps the keys of every tile, at most as many as the plan says
    several = [[*range(100), *np.random.default_rng(i).integers(100, 300, 100).tolist()] for i in range(4)]
    more = kept_a_layer(several) - 500 * said
    each = {"float32": 4, "bfloat16": 2}[dtype]
    copies = _tiles(shape, 500, 200, each, 2) - _tiles(shape, 500, 200, each, 1)
    assert 0.5 * copies < more < 1.1 * copies


def bytes_kept(config: Any, dtype: torch.dtype, trainable: str, sequences: list[list[int]]) -> float:
    """Bytes that torch keeps of a packed pass over sequences, weights left out."""
    model = (
        AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    )
    network = Network(model, byte_tokenizer(), "small")
    if trainable == "lora":
        network.model = with_adapter(network.base)
        fuse_adapters(network.base)
    network.activate("student" if trainable == "lora" else None, trainable=True)
    [(_, tree)] = pack_trees(sequences, max_tokens=10**6)
    weights = {p.untyped_storage().data_ptr() for p in network.base.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.hidden_states(tree)
    return sum(storage.nbytes() for storage in kept.values())


# Memory and time, by hand


def test_the_memory_of_a_rank_is_what_a_hand_reckons(folders: dict[str, str]):
    config = planned_recipe(folders, trainable="full", compute={"dtype": "float32"})
    work = work_of(config, prompt_tokens=512)
    layer = 128 * (256 + 64 + 64) + 256 * 128 + 3 * 128 * 384 + 2 * 128 + 2 * 32
    outside = 300 * 128 + 128
    parts = rank_memory(config, work, 4, H100)
    assert parts["weights"] == 4 * (2 * layer + outside) / 4
    assert parts["gradients"] == parts["weights"]
    assert parts["optimizer moments"] == 2 * parts["weights"]
    assert parts["gathered layers"] == 2 * 4 * layer + 4 * outside + 2 * 4 * 300 * 128 + 4 * layer
    # 4096 tokens in the largest pass; a layer keeps of each: 8 x 128 bytes of norms, 4 x (256 x 4 + 384 x 4 + 2 x 128) of what is
    # multiplied, 4 x (256 + 64) of queries and keys as normalised, and for weights that train 4 x (2 x 128 + 256 + 64) of norms
    assert parts["activations"] == 4096 * 2 * (8 * 128 + 4 * (1024 + 1536 + 256) + 4 * 320 + 4 * 576)
    assert parts["logits"] == 512 * 300 * (4 + 4 * 4)
    inside = {n: {"model": folders[n]} for n in ("one", "two")}
    exact = planned_recipe(folders, inside, objective={"type": "exact", "top_k": 32})
    parts = rank_memory(exact, work_of(exact, prompt_tokens=512), 4, H100)
    teacher = read_shape(folders["one"])
    assert parts["teachers' weights"] == 2 * 2 * (teacher.inside / 4 + 32000 * 2048 + 2048)
    assert parts["logits"] == 512 * 300 * (2 * 2 + 4 * 4)
    adapter = planned_recipe(folders)
    parts = rank_memory(adapter, work_of(adapter, prompt_tokens=512), 4, H100)
    trainable = adapter_parameters(folders["student"], rank=8, target_modules="all-linear")
    assert parts["weights"] == 2 * (2 * layer / 4 + outside) + 4 * trainable / 4
    assert parts["optimizer moments"] == 8 * trainable / 4


def test_samples_of_one_prompt_hold_it_once_in_each_pass_that_they_share(folders: dict[str, str]):
    work = work_of(planned_recipe(folders), prompt_tokens=512)  # 64 rollouts, groups of 4, responses of 256
    assert rank_share(work, 4, max_tokens=4096).tokens == 16 * 256 + 4 * 512
    assert rank_share(work, 4, max_tokens=1024).tokens == 16 * 256 + 8 * 512  # two samples to a pass
    assert rank_share(work, 4, max_tokens=4096).passes == 2
    assert rank_share(work, 4, max_tokens=100).largest == 768  # one sequence, whatever is asked


def test_as_many_sequences_fit_as_the_room_for_the_cache_holds():
    shape = read_shape(str(SHAPES / "qwen3-32b"))
    config = parse_config({**EXAMPLE.model_dump(), "sampling": {"prompts_per_step": 8, "max_new_tokens": 1536}})
    work = work_of(config, prompt_tokens=512)
    args = ["--gpu-memory-utilization=0.8", "--max-num-batched-tokens", "2048"]
    found = engine_memory(shape, 4, work, H100, args=args, each=2, scores=True, beside=0)
    room = 0.8 * 74.5 * GIB - 32_762_123_264 * 2 / 4 - 2048 * 151936 * 10 - 3 * GIB
    room -= 2048 * 2 * (4 * 5120 + 3 * 25600 / 4)
    assert found.parts["KV cache"] == pytest.approx(room)
    assert found.sequences == int(room // (2048 * 2 * 64 * 8 * 128 * 2 / 4))


EXAMPLE = parse_config(
    {
        "student": str(SHAPES / "qwen3-1.7b"),
        "output": "runs/none",
        "backend": "ray",
        "teachers": {"math": {"model": str(SHAPES / "qwen3-32b"), "engines": 1, "gpus_per_engine": 4}},
        "tasks": {"math": {"type": "file", "path": "x.jsonl", "teacher": "math"}},
        "objective": {"type": "top_k"},
        "compute": {"dtype": "bfloat16"},
    }
)


def test_sampling_takes_at_least_as_long_as_reading_the_weights_for_every_token():
    config = parse_config({**EXAMPLE.model_dump(), "sampling": {"prompts_per_step": 1, "max_new_tokens": 1000}})
    work = work_of(config, prompt_tokens=512)
    free = replace(H100, memory_fraction=1.0, matmul_fraction=1.0, step_ms=0.0)
    weights = 2 * (1_720_574_976 + work.trainable)
    cache = 2 * 28 * 8 * 128 * 2 * (512 + 500)
    first = 2 * work.student.products * 512 / 989e12 + 4 * 28 * 2048 * 512 * 256 / 989e12
    read = (work.student.products + work.student.head) * 2 / 3350e9
    found = sample_s(config, work, 1, 1, 256, free)
    assert found == pytest.approx(1000 * (weights + cache) / 3350e9 + max(first, read), rel=1e-3)


def test_scoring_and_updating_are_bound_by_products():
    config = parse_config({**EXAMPLE.model_dump(), "sampling": {"prompts_per_step": 8, "max_new_tokens": 1536}})
    work = work_of(config, prompt_tokens=512)
    free = replace(H100, matmul_fraction=1.0, link_fraction=1e9, step_ms=0.0, collective_us=0.0)
    [pool] = work.pools
    shape = pool.shape
    flops = 2 * (shape.products + 151936 * 5120) * 8 * 2048 + 4 * 64 * 8192 * 8 * 2048**2 / 2
    assert pool_s(config, work, pool, 2, 4, free) == pytest.approx(flops / 8 / 989e12)
    student, written = work.student, 8 * 1536
    seen = 8 * (512 * 256 + 1536 * (512 + 768))
    head = 2 * 151936 * 2048 * written
    forward = 2 * student.products * 8 * 2048 + 4 * 28 * 2048 * seen
    attention = 4 * 28 * 2048 * seen
    # frozen weights: backward costs as much as forward, of attention (a sequence a pass) two and a half times; logits are made,
    # made again, and multiplied for their gradient
    expected = (2 * forward + 1.5 * attention + 3 * head) / 989e12 + 28 * work.trainable / (3350e9 * 0.7)
    assert update_s(config, work, 1, free) == pytest.approx(expected)


def test_messages_are_parts_of_what_is_gathered_or_summed(folders: dict[str, str]):
    config = planned_recipe(folders)
    work = work_of(config, prompt_tokens=512)
    slow = replace(H100, matmul_fraction=1e9, memory_fraction=1e9, collective_us=3.0)
    layers = 2 * 2 * work.student.inside * 3 / 4  # bfloat16, forward and backward, of which a rank has a quarter
    expected = 2 * (layers + 4 * work.trainable * 3 / 4) / (450e9 * 0.7)  # two passes
    assert update_s(config, work, 4, slow) == pytest.approx(expected, rel=1e-6)
    nodes = update_s(config, work, 16, slow) / ((layers + 4 * work.trainable * 3 / 4) * 15 / 16 * 4 / 3)
    assert nodes == pytest.approx(1 / (8 * 50e9 * 0.7), rel=1e-6)  # past a node, by eight ways; one pass is left
    assert replace(slow, network_gb_s=100.0).link(16) == 450e9 * 0.7  # but no faster than within one
    assert slow.link(12) == 4 * 50e9 * 0.7  # one node has four of them
    # of each of two sums a layer three quarters pass twice
    expected = 2 * 2 * 10 * 128 * 2 * 2 * 3 / 4 / (450e9 * 0.7) + 2 * 2 * 5 * 3e-6
    assert split_s(work.student, 10, 5, 4, 2, slow) == pytest.approx(expected)
    assert split_s(work.student, 10, 5, 1, 2, slow) == 0


def test_devices_that_share_a_key_head_read_its_cache_each(tmp_path: Path):
    # eight devices and two key heads: four copies of the cache
    Qwen3Config(**SMALL | {"num_attention_heads": 8}).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert [kv_bytes_here(shape, n, 2) * n / shape.kv_bytes(2) for n in (1, 2, 4, 8)] == [1, 1, 2, 4]
    config = parse_config({**EXAMPLE.model_dump(), "student": str(tmp_path), "sampling": {"max_new_tokens": 2048}})
    free = replace(H100, matmul_fraction=1e9, link_fraction=1e9, step_ms=0.0, collective_us=0.0, memory_fraction=1.0)
    work = replace(work_of(config, prompt_tokens=1), trainable=0)
    read = 2 * (shape.products + shape.head), 2048 * shape.kv_bytes(2) / 2 * 32
    for devices, copies in ((1, 1), (8, 4)):
        expected = 2048 * (read[0] + copies * read[1]) / devices / 3350e9
        assert sample_s(config, work, 1, devices, 256, free) == pytest.approx(expected, rel=0.01)


def test_the_driver_reads_every_token_that_is_named(folders: dict[str, str]):
    for objective, named in (({"top_k": 20}, 20), ({"type": "immediate", "top_k": 32}, 0)):
        config = planned_recipe(folders, objective=objective)
        found = driver_s(config, work_of(config, prompt_tokens=512), H100)
        assert found == pytest.approx(64 * (1.6e-3 + 768 * (1e-6 + 0.4e-6 * named)))


def test_what_an_update_does_beside_its_passes_costs_as_many_more(folders: dict[str, str]):
    free = replace(H100, memory_fraction=1e9, link_fraction=1e9)
    sampled = {"type": "immediate", "top_k": 32}

    def seconds(**changes: Any) -> float:
        config = planned_recipe(folders, **changes)
        return update_s(config, work_of(config, prompt_tokens=512), 1, free)

    work = work_of(planned_recipe(folders), prompt_tokens=512)
    head = head_flops(work.student, 64 * 256) / free.flops(2)
    # by hand: 64 responses of 256 tokens, four to a prompt of 512
    tokens, seen = 64 * 256 + 16 * 512, 64 * 256 * (512 + 128) + 16 * 512 * 256
    attention = 4 * 2 * 256 * seen / free.flops(2)
    forward = 2 * work.student.products * tokens / free.flops(2) + attention + head
    once = 2 * forward + 2.5 * attention  # its keys are copied again for the gradient
    assert seconds(objective=sampled) == pytest.approx(once)
    assert seconds() == pytest.approx(once + head)  # logits of named tokens are made again
    again = seconds(objective=sampled, compute={"activation_checkpointing": True})
    assert again == pytest.approx(once + forward - head)
    assert seconds(objective=sampled | {"correction": {"type": "reject"}}) == pytest.approx(once + forward)
    assert seconds(objective=sampled | {"loss": "ppo", "epochs": 2}) == pytest.approx(2 * once)
    whole = {"trainable": "full", "compute": {"dtype": "float32"}}
    assert seconds(objective=sampled, **whole) == pytest.approx((3 * forward + 1.5 * attention) * 989 / 67)
    mixed = seconds(objective=sampled, cluster={"mixed_precision": True}, **whole)
    assert mixed == pytest.approx(3 * forward + 1.5 * attention)
    alone = seconds(objective=sampled, compute={"max_tokens": 100})  # one sequence a pass: 64 whole ones
    attention = 4 * 2 * 256 * (64 * 256 * (512 + 128) + 64 * 512 * 256) / free.flops(2)
    forward = 2 * work.student.products * 64 * 768 / free.flops(2) + attention + head
    assert alone == pytest.approx(2 * forward + 1.5 * attention)


def test_layers_that_are_computed_again_keep_their_inputs_and_one_of_them_whole(folders: dict[str, str]):
    config = planned_recipe(folders, compute={"activation_checkpointing": True})
    found = rank_memory(config, work_of(config, prompt_tokens=512), 1, H100)["activations"]
    assert found == 4096 * (kept_a_token(config, read_shape(folders["student"])) + 2 * 128 * 2)


def test_fewer_rollouts_at_once_take_longer(folders: dict[str, str]):
    def seconds(**changes: Any) -> float:
        return plan(planned_recipe(folders, **changes), 4).sample

    assert seconds(episodes={"max_concurrent": 16}) > 3 * seconds()
    assert seconds(remote={"max_in_flight": 16}) > 3 * seconds()
    assert seconds(cluster={"engine_args": ["--max-num-seqs", "16"]}) > 3 * seconds()


def test_episodes_of_several_turns_are_as_long_as_all_of_them(folders: dict[str, str]):
    tasks = {"one": {"type": "tools", "problems": "lookup", "teacher": "one"}}
    work = work_of(planned_recipe(folders, tasks=tasks, episodes={"max_turns": 3}), prompt_tokens=512)
    assert (work.turns, work.response) == (3, 3 * 256)
    long = planned_recipe(folders, tasks=tasks, episodes={"max_turns": 30})
    assert work_of(long, prompt_tokens=512).response == 4096 - 512  # the student takes no more


def test_an_adapter_goes_to_engines_faster_than_the_whole_student(folders: dict[str, str]):
    times = [
        plan(planned_recipe(folders, student=folders["one"], cluster=c), 4).transfer
        for c in ({}, {"merge_adapter": True})
    ]
    assert times[1] == pytest.approx(times[0] + 2 * (2 * read_shape(folders["one"]).parameters - 4 * ADAPTER) / 2e9)


ADAPTER = (
    16 * 8 * (2 * 2048 + 2 * (2048 + 512) + 2 * 2048 + 3 * (2048 + 8192))
)  # of rank 8 on all linear layers of "one"


def test_sleeping_teachers_that_share_no_size_are_refused(folders: dict[str, str], tmp_path: Path):
    common = {"vocab_size": 32000, "num_key_value_heads": 4, "head_dim": 128}
    large = {"hidden_size": 12288, "intermediate_size": 32768, "num_hidden_layers": 96, "num_attention_heads": 96}
    twelve = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 12}
    for name, dims in (("large", large), ("twelve", twelve)):
        Qwen3Config(**common, **dims).save_pretrained(tmp_path / name)
    engine = {"engines": 1, "gpus_per_engine": 8, "engine_args": ["--max-num-batched-tokens", "1024"]}
    teachers = {name: {"model": str(tmp_path / name), **engine} for name in ("large", "twelve")}
    config = planned_recipe(folders, teachers, cluster={"teachers_sleep": True})
    with pytest.raises(DoesNotFit, match=r"twelve' fits 1, 2, 4 GPUs, those before it 8; drop it"):
        plan(config, 64)
