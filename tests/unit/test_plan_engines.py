"""What a plan knows of engines: their arguments, over how many devices a model may be split, and placements that cannot be."""

from pathlib import Path

import pytest
from planning import H100, planned_recipe
from planning import folders as folders
from planning import read_once as read_once
from transformers import LlamaConfig

from opd_plan.memory import engine_running
from opd_plan.search import Plan, own_plan
from opd_plan.shapes import read_shape
from opd_plan.work import flag, work_of


@pytest.mark.parametrize(
    ("args", "number"),
    [
        ([], 7),
        (["--max-num-seqs", "64"], 64),
        (["--max_num_seqs=64"], 64),
        (["--max-num-seqs=8k"], 8000),
        (["--max-num-seqs", "8K"], 8192),
        (["--max-num-seqs=1.5k"], 1500),
        (["--max-num-seqs=64", "--max-num-seqs=32"], 32),
    ],
)
def test_arguments_of_engines_are_read_as_vllm_reads_them(args: list[str], number: float):
    assert flag(args, "--max-num-seqs", 7) == number


@pytest.mark.parametrize(
    ("args", "number"),
    [
        ([], 1024),
        (["--max-num-batched-tokens=512"], 512),  # vLLM runs no more sequences than a pass has tokens,
        (["--max-num-batched-tokens=512", "--max-num-seqs=600"], 600),  # unless it is told to
        (["--max-num-batched-tokens=4096"], 1024),
    ],
)
def test_an_engine_runs_no_more_sequences_than_a_pass_has_tokens(args: list[str], number: int):
    assert engine_running(args, H100) == number


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fit"), [(16, 8, [1, 2, 4, 8]), (12, 4, [1, 2, 4]), (9, 3, [1]), (8, 1, [1, 2, 4, 8])]
)
def test_engines_split_a_model_where_its_heads_do(tmp_path: Path, heads: int, kv_heads: int, fit: list[int]):
    LlamaConfig(hidden_size=288, num_attention_heads=heads, num_key_value_heads=kv_heads).save_pretrained(tmp_path)
    assert [n for n in (1, 2, 4, 8) if read_shape(str(tmp_path)).splits(n)] == fit


def test_a_placement_that_an_engine_cannot_split_has_no_time(folders: dict[str, str]):
    ranks = {"learner_ranks": 1, "gpus_per_rank": 1, "engines": 1}
    heads = read_shape(folders["student"]).heads
    assert heads % 3
    for gpus, there in ((1, True), (3, False)):
        config = planned_recipe(folders, cluster={**ranks, "gpus_per_engine": gpus})
        own = own_plan(config, work_of(config, prompt_tokens=512), H100)
        assert isinstance(own, Plan) == there
        assert there or own == "an engine of the student does not fit 3 GPUs, or cannot be split over them"
    config = planned_recipe(folders, cluster={"learner_ranks": 1, "engines": 1, "gpus_per_engine": 1})
    own = own_plan(config, work_of(config, prompt_tokens=512), H100)
    assert own == "cluster.gpus_per_rank is 0, so it asks for no GPU"
    config = planned_recipe(folders, cluster={**ranks, "gpus_per_engine": 16})
    own = own_plan(config, work_of(config, prompt_tokens=512), H100)
    assert own == "cluster.gpus_per_engine is 16, and an engine lives on one node of 8"
