"""Plans of a cluster that is not at hand: laws that they keep, what they refuse, what they print."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from factories import write_toml
from peft import LoraConfig
from planning import H100, plan, planned_recipe
from planning import folders as folders
from planning import read_once as read_once
from toy_runs import invoke, one_line

from opd.config import Config
from opd.errors import ModelError
from opd_plan.devices import GIB, Assumptions
from opd_plan.memory import pool_memory, rank_memory
from opd_plan.roofline import pool_s
from opd_plan.search import DoesNotFit, Plan, own_plan
from opd_plan.shapes import read_shape
from opd_plan.work import work_of

ROOT = Path(__file__).parents[2]


# Laws


def test_more_gpus_are_never_slower_and_what_is_placed_is_there(folders: dict[str, str]):
    for changes in ({}, {"cluster": {"max_staleness": 1}}, {"cluster": {"teachers_sleep": True}}):
        config = planned_recipe(folders, **changes)
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
    config = planned_recipe(folders, cluster={"max_staleness": staleness})
    assumed = replace(
        H100, driver_ms=0.0, driver_us=0.1, driver_named_us=0.0
    )  # so that teachers are not waited for anyway
    every = list(all_placements(config, 7, assumed))
    assert len(every) > 50
    found = plan(config, 7, assumed)
    fastest = min(placed.period for placed in every)
    assert found.period == pytest.approx(fastest)
    assert sum(teachers.gpus for teachers in found.teachers) > 2
    # of those that are as fast none takes fewer GPUs
    assert found.used == min(placed.used for placed in every if placed.period <= fastest * (1 + 1e-9))


def all_placements(config: Config, gpus: int, assumed: Assumptions) -> Iterator[Any]:
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
                    own = own_plan(given, work_of(given, prompt_tokens=512), assumed)
                    if isinstance(own, Plan):
                        yield own


def test_longer_responses_never_take_less_time(folders: dict[str, str]):
    times = []
    for length in (8, 64, 256, 512, 1000, 2000, 3500):
        found = plan(planned_recipe(folders, sampling={"max_new_tokens": length}), 16)
        times.append(found.step)
    assert times == sorted(times)
    assert times[-1] > 2 * times[0]


def test_a_rank_needs_less_memory_as_ranks_grow(folders: dict[str, str]):
    inside = {n: {"model": folders[n]} for n in ("one", "two")}
    for config in (planned_recipe(folders), planned_recipe(folders, inside, objective={"type": "exact", "top_k": 32})):
        work = work_of(config, prompt_tokens=512)
        sizes = [sum(rank_memory(config, work, n, H100).values()) for n in (1, 2, 4, 8, 16, 32)]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)


def test_sleeping_teachers_take_the_devices_of_one(folders: dict[str, str]):
    apart, turns = planned_recipe(folders), planned_recipe(folders, cluster={"teachers_sleep": True})
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
    shared = planned_recipe(folders, {n: {"model": folders["one"], **engines} for n in ("even", "odd")})
    [pool] = work_of(shared, prompt_tokens=512).pools
    assert pool.names == ("even", "odd")
    assert pool.rollouts == 64
    assert min(g for g in range(1, 9) if fits(shared, g)) == 3
    inside = {"even": {"model": folders["one"]}, "odd": {"model": folders["one"]}}
    work = work_of(planned_recipe(folders, inside, objective={"type": "exact", "top_k": 32}), prompt_tokens=512)
    assert [shape.source for shape in work.frozen] == [folders["one"]]
    assert [policy.rollouts for policy in work.policies] == [32, 32]


def test_teachers_score_their_share_of_the_tasks(folders: dict[str, str]):
    tasks = {"one": {"type": "file", "path": "x.jsonl", "teacher": "one", "weight": 3.0}}
    work = work_of(planned_recipe(folders, tasks=tasks), prompt_tokens=512)
    assert [pool.rollouts for pool in work.pools] == [48, 16]


def test_adapters_speak_through_the_students_own_weights(folders: dict[str, str], tmp_path: Path):
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    config = planned_recipe(folders, {"own": {"adapter": str(tmp_path)}}, objective={"type": "exact", "top_k": 32})
    work = work_of(config, prompt_tokens=512)
    assert work.frozen == ()
    assert work.adapters == 2 * 4 * (128 + 256)
    assert plan(config, 2).score > 0
    whole = planned_recipe(folders, {"own": {"adapter": str(tmp_path)}}, objective={"type": "exact", "top_k": 32}, trainable="full",
                   compute={"dtype": "float32"})  # fmt: skip
    assert [shape.source for shape in work_of(whole, prompt_tokens=512).frozen] == [folders["student"]]


def test_steps_ahead_hide_the_shorter_side(folders: dict[str, str]):
    found = plan(planned_recipe(folders, cluster={"max_staleness": 2}), 8)
    assert found.overlapped == max(found.sample + found.score, found.update + found.transfer)
    inside = planned_recipe(folders, {"one": {"model": folders["one"]}}, objective={"type": "exact", "top_k": 32},
                    cluster={"max_staleness": 2})  # fmt: skip
    found = plan(inside, 8, replace(H100, step_ms=0.0, memory_fraction=1e6))  # the same ranks score and learn
    assert found.sample < found.update
    assert found.overlapped == pytest.approx(found.score + found.update + found.transfer)


# Refusals


def test_what_cannot_fit_is_refused_with_how_much_it_lacks(folders: dict[str, str]):
    with pytest.raises(
        DoesNotFit, match=r"^3 GPUs: at least 4 are needed \(1 for the learner, 1 for an engine of the student"
    ):
        plan(planned_recipe(folders), 3)
    engines = {"engines": 1, "gpus_per_engine": 8}
    vast = planned_recipe(folders, {"vast": {"model": folders["vast"], **engines}})
    with pytest.raises(
        DoesNotFit, match=r"^64 GPUs: an engine of '.*/vast' over 8 of them may take 67.0 GiB of each h100"
    ) as error:
        plan(vast, 64)
    need, lacks = 3 + 2 * read_shape(folders["vast"]).parameters / 8 / GIB, str(error.value)
    assert f"weights {need - 3:.1f}" in lacks
    assert "too few; try a --gpu with more memory or shorter sequences" in lacks
    inside = planned_recipe(folders, {"vast": {"model": folders["vast"]}}, objective={"type": "exact", "top_k": 32})
    with pytest.raises(
        DoesNotFit, match=r"^8 GPUs: one of 8 learner ranks needs .* most of it is 'teachers' weights'"
    ) as error:
        plan(inside, 8)
    ranks = int(re.search(r"or more GPUs \((\d+) ranks fit\)", str(error.value)).group(1))  # type: ignore[union-attr]
    sizes = [sum(rank_memory(inside, work_of(inside, prompt_tokens=512), n, H100).values()) for n in (ranks - 8, ranks)]
    assert sizes[1] <= 74.5 * GIB < sizes[0]


def test_activations_that_do_not_fit_say_what_to_set(folders: dict[str, str]):
    changes: dict[str, Any] = {"student": folders["one"], "sampling": {"max_new_tokens": 2048, "prompts_per_step": 64}}
    config = planned_recipe(folders, compute={"max_tokens": 65536}, **changes)
    with pytest.raises(
        DoesNotFit, match=r"'activations'.*try compute.activation_checkpointing = true, a smaller compute.max"
    ):
        plan(config, 8)
    assert fits(planned_recipe(folders, compute={"max_tokens": 8192}, **changes), 8)


def test_models_that_the_plan_cannot_count_are_refused(folders: dict[str, str], tmp_path: Path):
    with pytest.raises(ModelError, match=r"reads a config.json; name the Hugging Face folder of the same model"):
        read_shape(str(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=r"has no config.json, all that a plan needs of it"):
        read_shape(str(tmp_path))
    for text in (
        "{",
        '{"model_type": "nothing"}',
        '{"model_type": "llama", "hidden_size": 128, "num_attention_heads": 9}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"has no config.json that can be read"):
            read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match=r"is no causal language model|does not name its layers"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ModelError, match=r"has experts, and a plan counts dense decoders"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["backend=local"], "a plan places the parts of backend = 'ray'"),
        (["--gpus", "8,x"], "--gpus '8,x': expected numbers from 1"),
        (["--gpus", "0"], "--gpus '0': expected numbers from 1"),
        (["--gpu", "k80"], "expected one of a100-80, h100, h200, b200"),
        (["--prompt-tokens", "5000"], "lower --prompt-tokens"),
        (["--gpus", "2"], "2 GPUs: at least 4 are needed"),
        (["cluster.engine_args=['--max-num-seqs', 'many']"], "engine_args: --max-num-seqs 'many' is no number"),
        (
            ["cluster.engine_args=['--max-num-seqs=nan']"],
            "engine_args: --max-num-seqs 'nan', expected a number above 0",
        ),
        (["cluster.engine_args=['--max-num-batched-tokens=0']"], "'0', expected a number above 0"),
    ],
)
def test_the_command_refuses_in_one_line(folders: dict[str, str], tmp_path: Path, arguments: list[str], reason: str):
    tree = planned_recipe(folders).model_dump(mode="json", exclude_defaults=True)
    if "backend=local" in arguments:
        tree |= {"cluster": {}, "teachers": {"one": {"model": folders["one"]}}, "tasks": {"one": tree["tasks"]["one"]}}
        tree["objective"] = {"type": "exact"}
    path = write_toml(tmp_path / "recipe.toml", tree)
    result = invoke("plan", path, *arguments)
    assert reason in one_line(result)
    assert result.stdout == ""


# What is printed


def test_the_example_prints_a_whole_plan_for_16_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    result = invoke("plan", "recipes/plan_16_gpus.toml", "--gpus", "16")
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
    assert shown in " ".join((ROOT / "docs/reference/cluster-plan.md").read_text(encoding="utf-8").split())


def test_the_settings_that_are_printed_are_the_placement(folders: dict[str, str], tmp_path: Path):
    config = planned_recipe(folders, cluster={"max_staleness": 1})
    path = write_toml(tmp_path / "recipe.toml", config.model_dump(mode="json", exclude_defaults=True))
    found = plan(config, 16)
    text = invoke("plan", path, "--gpus", "16").stdout
    settings = [line.strip() for line in text.split("settings (into the recipe's own tables)")[1].splitlines() if line]
    table, overrides = "", []
    for line in settings:
        if line.startswith("["):
            table = line.strip("[]")
        else:
            overrides.append(f"{table}.{line.replace(' ', '')}")
    again = invoke("plan", path, "--gpus", "16", *overrides).stdout
    assert f"the recipe's own placement takes {found.used} GPUs and" in again
    own = again.split("the recipe's own placement takes")[1].split(" and ")[1].split()[0]
    assert own in again.split("step, later ones")[1].splitlines()[0]


def test_gpus_that_stay_idle_are_named_and_counts_that_do_not_fit_end_with_a_line(
    folders: dict[str, str], tmp_path: Path
):
    path = write_toml(tmp_path / "recipe.toml", planned_recipe(folders).model_dump(mode="json", exclude_defaults=True))
    result = invoke("plan", path, "--gpus", "2,512")
    assert one_line(result).startswith("opd: 2 GPUs: at least 4 are needed")
    idle = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["idle"])
    assert int(idle.split()[1]) == plan(planned_recipe(folders), 512).idle > 0


def test_what_is_unknown_is_said_and_never_counted_as_nothing(folders: dict[str, str], tmp_path: Path):
    config = planned_recipe(folders, {"far": {"url": "http://127.0.0.1:9", "served_model": "far"}})
    path = write_toml(tmp_path / "recipe.toml", config.model_dump(mode="json", exclude_defaults=True))
    said = invoke("plan", path, "--gpus", "4").stdout
    assert "teacher far: behind a url, no GPU of this cluster; its time is unknown" in said
    rows = {
        line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1].strip()
        for line in said.splitlines()
        if "unknown" in line
    }
    assert rows["score"] == "unknown"
    assert rows["step, one after the other"].endswith(" + unknown")
