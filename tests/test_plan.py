"""What a plan says of a cluster that is not at hand: counts beside real models, memory and time by hand, laws, refusals."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import invoke, one_line
from factories import byte_tokenizer, write_toml
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from opd.config import Config, parse_config
from opd.data.tree import pack_trees
from opd.embedded.linear import fuse_adapters
from opd.embedded.network import Network
from opd.errors import ModelError
from opd.plan.devices import DEVICES, GIB, Assumptions
from opd.plan.memory import engine_memory, kept_a_token, pool_memory, rank_memory, rank_share
from opd.plan.roofline import head_flops, layers_flops, pool_s, sample_s, update_s
from opd.plan.search import DoesNotFit, best_plan, own_plan
from opd.plan.shapes import adapter_parameters, read_shape
from opd.plan.work import work_of

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples/distributed/shapes"
H100 = Assumptions(DEVICES["h100"])
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with a config.json alone: a small student, two teachers of a billion parameters, one that no node holds."""
    base = tmp_path_factory.mktemp("shapes")
    wide = {**SMALL, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    wide |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    vast = {**wide, "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 120}
    every = {"student": SMALL, "one": wide, "two": wide, "vast": vast}
    for name, dims in every.items():
        Qwen3Config(**dims).save_pretrained(base / name)
    return {name: str(base / name) for name in every}


def recipe(folders: dict[str, str], teachers: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A distributed recipe whose teachers are two models at engines; tables that are given are merged into its own."""
    engines = {"engines": 1, "gpus_per_engine": 1, "engine_args": ["--max-num-batched-tokens", "1024"]}
    teachers = teachers or {name: {"model": folders[name], **engines} for name in ("one", "two")}
    tree: dict[str, Any] = {
        "student": folders["student"],
        "output": "runs/none",
        "mode": "distributed",
        "cluster": {},
        "teachers": teachers,
        "tasks": {n: {"type": "file", "path": "x.jsonl", "teacher": n} for n in teachers},
        "sampling": {"prompts_per_step": 16, "group_size": 4, "max_new_tokens": 256},
        "objective": {"type": "support", "support": 8},
        "lora": {"rank": 8, "alpha": 8},
        "compute": {"dtype": "bfloat16", "max_tokens": 4096},
        "served": {"max_in_flight": 64},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return parse_config(tree)


def plan(config: Config, gpus: int, assumed: Assumptions = H100):
    return best_plan(config, work_of(config, prompt_tokens=assumed.prompt_tokens), gpus, assumed)


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
    kept = [bytes_kept(kind(**SMALL | {"num_hidden_layers": n}), getattr(torch, dtype), trainable) for n in (1, 3)]
    kind(**SMALL).save_pretrained(tmp_path)
    config = recipe(folders, trainable=trainable, compute={"dtype": dtype})
    said = kept_a_token(config, read_shape(str(tmp_path)))
    assert said == pytest.approx((kept[1] - kept[0]) / 2, rel=0.05)


def bytes_kept(config: Any, dtype: torch.dtype, trainable: str) -> float:
    """Bytes that torch keeps of each token of a packed pass over one sequence, weights left out."""
    model = (
        AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    )
    network = Network(model, byte_tokenizer(), "small")
    if trainable == "lora":
        network.model = with_adapter(network.base)
        fuse_adapters(network.base)
    network.activate("student" if trainable == "lora" else None, trainable=True)
    [(_, tree)] = pack_trees([np.arange(200).tolist()], max_tokens=10**6)
    weights = {p.untyped_storage().data_ptr() for p in network.base.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.hidden_states(tree)
    return sum(storage.nbytes() for storage in kept.values()) / len(tree)


# Memory and time, by hand


def test_the_memory_of_a_rank_is_what_a_hand_reckons(folders: dict[str, str]):
    config = recipe(folders, trainable="full", compute={"dtype": "float32"})
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
    assert parts["logits"] == 256 * 300 * (4 + 4 * 4)
    adapter = recipe(folders)
    parts = rank_memory(adapter, work_of(adapter, prompt_tokens=512), 4, H100)
    trainable = adapter_parameters(folders["student"], rank=8, target_modules="all-linear")
    assert parts["weights"] == 2 * (2 * layer / 4 + outside) + 4 * trainable / 4
    assert parts["optimizer moments"] == 8 * trainable / 4


def test_samples_of_one_prompt_hold_it_once_in_each_pass_that_they_share(folders: dict[str, str]):
    work = work_of(recipe(folders), prompt_tokens=512)  # 64 rollouts, groups of 4, responses of 256
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
        "mode": "distributed",
        "teachers": {"math": {"model": str(SHAPES / "qwen3-32b"), "engines": 1, "gpus_per_engine": 4}},
        "tasks": {"math": {"type": "file", "path": "x.jsonl", "teacher": "math"}},
        "objective": {"type": "support"},
        "compute": {"dtype": "bfloat16"},
    }
)


def test_sampling_takes_at_least_as_long_as_reading_the_weights_for_every_token():
    config = parse_config({**EXAMPLE.model_dump(), "sampling": {"prompts_per_step": 1, "max_new_tokens": 1000}})
    work = work_of(config, prompt_tokens=512)
    free = replace(H100, memory_share=1.0, matmul_share=1.0, step_ms=0.0)
    weights = 2 * (1_720_574_976 + work.trainable)
    cache = 2 * 28 * 8 * 128 * 2 * (512 + 500)
    first = 2 * work.student.products * 512 / 989e12 + 4 * 28 * 2048 * 512 * 256 / 989e12
    read = (work.student.products + work.student.head) * 2 / 3350e9
    found = sample_s(config, work, 1, 1, 256, free)
    assert found == pytest.approx(1000 * (weights + cache) / 3350e9 + max(first, read), rel=1e-3)


def test_scoring_and_updating_are_bound_by_products():
    config = parse_config({**EXAMPLE.model_dump(), "sampling": {"prompts_per_step": 8, "max_new_tokens": 1536}})
    work = work_of(config, prompt_tokens=512)
    free = replace(H100, matmul_share=1.0, link_share=1e9, step_ms=0.0, collective_us=0.0)
    [pool] = work.pools
    shape = pool.shape
    flops = 2 * (shape.products + 151936 * 5120) * 8 * 2048 + 4 * 64 * 8192 * 8 * 2048**2 / 2
    assert pool_s(config, work, pool, 2, 4, free) == pytest.approx(flops / 8 / 989e12)
    student, written = work.student, 8 * 1536
    seen = 8 * (512 * 256 + 1536 * (512 + 768))
    head = 2 * 151936 * 2048 * written
    forward = 2 * student.products * 8 * 2048 + 4 * 28 * 2048 * seen
    # frozen weights: backward costs as much as forward; logits are made, made again, and multiplied for their gradient
    expected = (2 * forward + 3 * head) / 989e12 + 28 * work.trainable / (3350e9 * 0.7)
    assert update_s(config, work, 1, free) == pytest.approx(expected)


def test_what_an_update_does_beside_its_passes_costs_as_many_more(folders: dict[str, str]):
    free = replace(H100, memory_share=1e9, link_share=1e9)
    sampled = {"type": "immediate", "support": 32}

    def seconds(**changes: Any) -> float:
        config = recipe(folders, **changes)
        return update_s(config, work_of(config, prompt_tokens=512), 1, free)

    work = work_of(recipe(folders), prompt_tokens=512)
    head = head_flops(work.student, 64 * 256) / free.flops(2)
    forward = seconds(objective=sampled) / 2
    assert seconds() == pytest.approx(2 * forward + head)  # logits of named tokens are made again
    assert seconds(objective=sampled, cluster={"activation_checkpointing": True}) == pytest.approx(3 * forward - head)
    assert seconds(objective=sampled | {"correction": {"type": "reject"}}) == pytest.approx(3 * forward)
    assert seconds(objective=sampled | {"loss": "ppo", "epochs": 2}) == pytest.approx(4 * forward)
    whole = {"trainable": "full", "compute": {"dtype": "float32"}}
    assert seconds(objective=sampled, **whole) == pytest.approx(3 * forward * 989 / 67)
    assert seconds(objective=sampled, cluster={"mixed_precision": True}, **whole) == pytest.approx(3 * forward)


def test_layers_that_are_computed_again_keep_their_inputs_and_one_of_them_whole(folders: dict[str, str]):
    config = recipe(folders, cluster={"activation_checkpointing": True})
    found = rank_memory(config, work_of(config, prompt_tokens=512), 1, H100)["activations"]
    assert found == 4096 * (kept_a_token(config, read_shape(folders["student"])) + 2 * 128 * 2)


def test_fewer_rollouts_at_once_take_longer(folders: dict[str, str]):
    def seconds(**changes: Any) -> float:
        return plan(recipe(folders, **changes), 4).sample

    assert seconds(episodes={"max_concurrent": 16}) > 3 * seconds()
    assert seconds(served={"max_in_flight": 16}) > 3 * seconds()
    assert seconds(cluster={"engine_args": ["--max-num-seqs", "16"]}) > 3 * seconds()


def test_episodes_of_several_turns_are_as_long_as_all_of_them(folders: dict[str, str]):
    tasks = {"one": {"type": "tools", "problems": "lookup", "teacher": "one"}}
    work = work_of(recipe(folders, tasks=tasks, episodes={"max_turns": 3}), prompt_tokens=512)
    assert (work.turns, work.response) == (3, 3 * 256)
    long = recipe(folders, tasks=tasks, episodes={"max_turns": 30})
    assert work_of(long, prompt_tokens=512).response == 4096 - 512  # the student takes no more


def test_an_adapter_goes_to_engines_faster_than_the_whole_student(folders: dict[str, str]):
    times = [
        plan(recipe(folders, student=folders["one"], cluster=c), 4).transfer for c in ({}, {"merge_adapter": True})
    ]
    assert times[1] == pytest.approx(times[0] + 2 * (2 * read_shape(folders["one"]).parameters - 4 * ADAPTER) / 2e9)


ADAPTER = (
    16 * 8 * (2 * 2048 + 2 * (2048 + 512) + 2 * 2048 + 3 * (2048 + 8192))
)  # of rank 8 on all linear layers of "one"


# Laws


def test_more_gpus_are_never_slower_and_what_is_placed_is_there(folders: dict[str, str]):
    for changes in ({}, {"cluster": {"max_staleness": 1}}, {"cluster": {"teachers_sleep": True}}):
        config = recipe(folders, **changes)
        found = [plan(config, gpus) for gpus in (4, 5, 6, 7, 8, 9, 12, 16, 24, 40, 64, 200)]
        assert all(more.period <= fewer.period for fewer, more in pairwise(found))
        assert found[-1].period < found[0].period
        for one in found:
            assert one.ranks + one.student.gpus + sum(t.gpus for t in one.teachers) + one.idle == one.gpus
            assert one.idle >= 0
            assert one.nearly <= one.used
            assert all(8 % engines.devices == 0 for engines in (one.student, *one.teachers))


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_plan_is_the_fastest_of_all_placements(folders: dict[str, str], staleness: int):
    config = recipe(folders, cluster={"max_staleness": staleness})
    every = [placed.period for placed in all_placements(config, 7)]
    assert len(every) > 50
    assert plan(config, 7).period == pytest.approx(min(every))


def all_placements(config: Config, gpus: int) -> Iterator[Any]:
    """Every split of so many GPUs over one rank or several, engines of the student and of both teachers."""
    splits = [(count, devices) for devices in (1, 2, 4, 8) for count in range(1, gpus // devices + 1)]
    for ranks in (1, 2, 4, 8):
        for n, d in splits:
            for (n1, d1), (n2, d2) in ((a, b) for a in splits for b in splits):
                if ranks + n * d + n1 * d1 + n2 * d2 <= gpus:
                    teachers = {
                        name: teacher.model_copy(update={"engines": count, "gpus_per_engine": devices})
                        for (name, teacher), count, devices in zip(
                            config.teachers.items(), (n1, n2), (d1, d2), strict=True
                        )
                    }
                    cluster = {"learner_ranks": ranks, "gpus_per_rank": 1, "engines": n, "gpus_per_engine": d}
                    given = config.model_copy(
                        update={"teachers": teachers, "cluster": config.cluster.model_copy(update=cluster)}
                    )
                    if (own := own_plan(given, work_of(given, prompt_tokens=512), H100)) is not None:
                        yield own


def test_longer_responses_never_take_less_time(folders: dict[str, str]):
    times = []
    for length in (8, 64, 256, 512, 1000, 2000, 3500):
        found = plan(recipe(folders, sampling={"max_new_tokens": length}), 16)
        times.append(found.step)
    assert times == sorted(times)
    assert times[-1] > 2 * times[0]


def test_a_rank_needs_less_memory_as_ranks_grow(folders: dict[str, str]):
    inside = {n: {"model": folders[n]} for n in ("one", "two")}
    for config in (recipe(folders), recipe(folders, inside, objective={"type": "exact", "support": 32})):
        work = work_of(config, prompt_tokens=512)
        sizes = [sum(rank_memory(config, work, n, H100).values()) for n in (1, 2, 4, 8, 16, 32)]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)


def test_sleeping_teachers_take_the_devices_of_one(folders: dict[str, str]):
    apart, turns = recipe(folders), recipe(folders, cluster={"teachers_sleep": True})
    least = [min(g for g in range(1, 9) if fits(config, g)) for config in (apart, turns)]
    assert least == [4, 3]
    found = plan(turns, 3)
    assert len(found.teachers) == 1
    work = work_of(turns, prompt_tokens=512)
    memory = [pool_memory(turns, work, pool, 1, H100).parts for pool in work.pools]
    assert memory[0]["weights"] == memory[1]["weights"] == 2 * read_shape(folders["one"]).parameters
    assert memory[0]["asleep"] == 1.5 * GIB
    # they take turns: both times, and the way to the host's memory and back
    score = sum(pool_s(turns, work, pool, 1, 1, H100) for pool in work.pools)
    moved = 2 * 2 * 2 * read_shape(folders["one"]).parameters / (64e9 * 0.7)
    assert found.score == pytest.approx(score + moved)


def fits(config: Config, gpus: int) -> bool:
    try:
        plan(config, gpus)
    except DoesNotFit:
        return False
    return True


def test_a_model_that_teachers_share_is_counted_once(folders: dict[str, str]):
    engines = {"engines": 1, "gpus_per_engine": 1}
    shared = recipe(folders, {n: {"model": folders["one"], **engines} for n in ("even", "odd")})
    [pool] = work_of(shared, prompt_tokens=512).pools
    assert pool.names == ("even", "odd")
    assert pool.rollouts == 64
    assert min(g for g in range(1, 9) if fits(shared, g)) == 3
    inside = {"even": {"model": folders["one"]}, "odd": {"model": folders["one"]}}
    work = work_of(recipe(folders, inside, objective={"type": "exact", "support": 32}), prompt_tokens=512)
    assert [shape.source for shape in work.frozen] == [folders["one"]]
    assert [voice.rollouts for voice in work.voices] == [32, 32]


def test_teachers_score_their_share_of_the_tasks(folders: dict[str, str]):
    tasks = {"one": {"type": "file", "path": "x.jsonl", "teacher": "one", "weight": 3.0}}
    work = work_of(recipe(folders, tasks=tasks), prompt_tokens=512)
    assert [pool.rollouts for pool in work.pools] == [48, 16]


def test_adapters_speak_through_the_students_own_weights(folders: dict[str, str], tmp_path: Path):
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    config = recipe(folders, {"own": {"adapter": str(tmp_path)}}, objective={"type": "exact", "support": 32})
    work = work_of(config, prompt_tokens=512)
    assert work.frozen == ()
    assert work.adapters == 2 * 4 * (128 + 256)
    assert plan(config, 2).score > 0
    whole = recipe(folders, {"own": {"adapter": str(tmp_path)}}, objective={"type": "exact", "support": 32}, trainable="full",
                   compute={"dtype": "float32"})  # fmt: skip
    assert [shape.source for shape in work_of(whole, prompt_tokens=512).frozen] == [folders["student"]]


def test_steps_ahead_hide_the_shorter_side(folders: dict[str, str]):
    found = plan(recipe(folders, cluster={"max_staleness": 2}), 8)
    assert found.overlapped == max(found.sample + found.score, found.update + found.transfer)
    inside = recipe(folders, {"one": {"model": folders["one"]}}, objective={"type": "exact", "support": 32},
                    cluster={"max_staleness": 2})  # fmt: skip
    found = plan(inside, 8)  # the same ranks score and learn
    assert found.overlapped == max(found.sample + found.score, found.score + found.update + found.transfer)


# Refusals


def test_what_cannot_fit_is_refused_with_how_much_it_lacks(folders: dict[str, str]):
    with pytest.raises(
        DoesNotFit, match=r"^3 GPUs: at least 4 are needed \(1 for the learner, 1 for an engine of the student"
    ):
        plan(recipe(folders), 3)
    engines = {"engines": 1, "gpus_per_engine": 8}
    vast = recipe(folders, {"vast": {"model": folders["vast"], **engines}})
    with pytest.raises(
        DoesNotFit, match=r"^64 GPUs: an engine of '.*/vast' over 8 of them may take 67.0 GiB of each h100"
    ) as error:
        plan(vast, 64)
    need, lacks = 3 + 2 * read_shape(folders["vast"]).parameters / 8 / GIB, str(error.value)
    assert f"weights {need - 3:.1f}" in lacks
    assert "too few; try a --gpu with more memory or shorter sequences" in lacks
    inside = recipe(folders, {"vast": {"model": folders["vast"]}}, objective={"type": "exact", "support": 32})
    with pytest.raises(DoesNotFit, match=r"^8 GPUs: one of 8 learner ranks needs .* most of it is 'teachers' weights'"):
        plan(inside, 8)


def test_activations_that_do_not_fit_say_what_to_set(folders: dict[str, str]):
    changes: dict[str, Any] = {"student": folders["one"], "sampling": {"max_new_tokens": 2048, "prompts_per_step": 64}}
    config = recipe(folders, compute={"max_tokens": 65536}, **changes)
    with pytest.raises(
        DoesNotFit, match=r"'activations'.*try cluster.activation_checkpointing = true or a smaller compute.max"
    ):
        plan(config, 8)
    assert fits(recipe(folders, compute={"max_tokens": 8192}, **changes), 8)


def test_models_that_the_plan_cannot_count_are_refused(folders: dict[str, str], tmp_path: Path):
    with pytest.raises(ModelError, match=r"reads a config.json; name the Hugging Face folder of the same model"):
        read_shape(str(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=r"has no config.json, all that a plan needs of it"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ModelError, match=r"has experts, and a plan counts dense decoders"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["mode=embedded"], "a plan places the parts of mode = 'distributed'"),
        (["--gpus", "8,x"], "--gpus '8,x': expected numbers from 1"),
        (["--gpus", "0"], "--gpus '0': expected numbers from 1"),
        (["--gpu", "k80"], "expected one of a100-80, h100, h200, b200"),
        (["--prompt-tokens", "5000"], "lower --prompt-tokens"),
        (["--gpus", "2"], "2 GPUs: at least 4 are needed"),
        (["cluster.engine_args=['--max-num-seqs', 'many']"], "engine_args: --max-num-seqs 'many' is no number"),
    ],
)
def test_the_command_refuses_in_one_line(folders: dict[str, str], tmp_path: Path, arguments: list[str], reason: str):
    tree = recipe(folders).model_dump(mode="json", exclude_defaults=True)
    if "mode=embedded" in arguments:
        tree |= {"cluster": {}, "teachers": {"one": {"model": folders["one"]}}, "tasks": {"one": tree["tasks"]["one"]}}
        tree["objective"] = {"type": "exact"}
    path = write_toml(tmp_path / "recipe.toml", tree)
    assert reason in one_line(invoke("cluster", "plan", path, *arguments))


# What is printed


def test_the_example_prints_a_whole_plan_for_16_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    result = invoke("cluster", "plan", "recipes/plan_16_gpus.toml", "--gpus", "16")
    assert result.exit_code == 0, result.stderr
    said = result.stdout
    assert said.startswith("ESTIMATES from the assumptions below; nothing here was measured.")
    parts = [
        "50% of TFLOPS",
        "2048: as long as they may",
        "989 TFLOPS (bfloat16",
        "idle",
        "KV cache",
        "optimizer moments",
    ]
    parts += [
        "step, later ones sampled meanwhile (max_staleness = 1)",
        "[teachers.code]",
        "== 16 GPUs (h100), estimated ==",
    ]
    for part in parts:
        assert part in said, part
    shown = " ".join(said.split())
    assert shown in " ".join((ROOT / "docs/cluster_plan.md").read_text(encoding="utf-8").split())


def test_the_settings_that_are_printed_are_the_placement(folders: dict[str, str], tmp_path: Path):
    config = recipe(folders, cluster={"max_staleness": 1})
    path = write_toml(tmp_path / "recipe.toml", config.model_dump(mode="json", exclude_defaults=True))
    found = plan(config, 16)
    text = invoke("cluster", "plan", path, "--gpus", "16").stdout
    settings = [line.strip() for line in text.split("settings (into the recipe's own tables)")[1].splitlines() if line]
    table, overrides = "", []
    for line in settings:
        if line.startswith("["):
            table = line.strip("[]")
        else:
            overrides.append(f"{table}.{line.replace(' ', '')}")
    again = invoke("cluster", "plan", path, "--gpus", "16", *overrides).stdout
    assert f"the recipe's own placement takes {found.used} GPUs and" in again
    own = again.split("the recipe's own placement takes")[1].split(" and ")[1].split()[0]
    assert own in again.split("step, later ones")[1].splitlines()[0]


def test_gpus_that_stay_idle_are_named_and_counts_that_do_not_fit_end_with_a_line(
    folders: dict[str, str], tmp_path: Path
):
    path = write_toml(tmp_path / "recipe.toml", recipe(folders).model_dump(mode="json", exclude_defaults=True))
    result = invoke("cluster", "plan", path, "--gpus", "2,512")
    assert one_line(result).startswith("opd: 2 GPUs: at least 4 are needed")
    idle = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["idle"])
    assert int(idle.split()[1]) == plan(recipe(folders), 512).idle > 0


def test_what_is_unknown_is_said_and_never_counted_as_nothing(folders: dict[str, str], tmp_path: Path):
    config = recipe(folders, {"far": {"url": "http://127.0.0.1:9", "served_model": "far"}})
    path = write_toml(tmp_path / "recipe.toml", config.model_dump(mode="json", exclude_defaults=True))
    said = invoke("cluster", "plan", path, "--gpus", "4").stdout
    assert "teacher far: behind a url, no GPU of this cluster; its time is unknown" in said
    rows = {
        line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1].strip()
        for line in said.splitlines()
        if "unknown" in line
    }
    assert rows["score"] == "unknown"
    assert rows["step, one after the other"].endswith(" + unknown")
