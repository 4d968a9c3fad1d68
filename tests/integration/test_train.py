"""Training from end to end on toy models: that it learns, and what a run leaves behind."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import prompt, rollout, save_toy, scored, sft_recipe, toy_recipe, write_prompts
from matplotlib.image import imread
from peft import PeftModel
from safetensors.torch import load_file
from toy_runs import Run, newest, other_words, reward_of, train, with_pictures
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd import checkpoint
from opd.local.build import build
from opd.logging.run_folder import RunFolder
from opd.records import ChunkScore, FailedScore, Flag

IDS = torch.tensor([[256, 104, 105, 32, 119, 111, 114, 108, 100, 257]])


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A toy expert made by `opd.sft`: its recipe's tree."""
    folder = tmp_path_factory.mktemp("sft")
    tree = sft_recipe(folder, save_toy(folder / "base", 0))
    opd.sft(opd.parse_config(tree, kind=opd.SftConfig))
    return tree


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, expert: dict[str, Any]) -> Run:
    """Forty steps toward a whole model (even) and an adapter made by sft (odd)."""
    tree = toy_recipe(
        tmp_path_factory.mktemp("mixed"),
        student=expert["student"],
        steps=40,
        lora={"rank": 8, "alpha": 32},
        optimizer={"lr": 2e-2},
        checkpoint={"every": 7, "keep": 3},
    )
    tree["teachers"]["odd"] = {"adapter": f"{expert['output']}/student"}
    for key in ("path", "held_out_path"):
        other_words(tree["tasks"]["second"][key])
    with with_pictures():
        return train(tree)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, expert: dict[str, Any]) -> Run:
    """A run that trains every weight of the student toward an adapter and a whole model."""
    tree = toy_recipe(
        tmp_path_factory.mktemp("whole"), student=expert["student"], steps=6, trainable="full", optimizer={"lr": 3e-3}
    )
    tree["teachers"]["odd"] = {"adapter": f"{expert['output']}/student"}
    return train(tree)


def test_the_exact_objective_brings_the_reverse_kl_down(mixed: Run):
    lines = opd.read_metrics(mixed.path)
    for teacher in ("even", "odd"):
        curve = [line[f"kl/token/{teacher}/mean"] for line in lines]
        assert np.mean(curve[-5:]) < 0.7 * np.mean(curve[:5]), teacher
    assert len(mixed.result.parity) == 3
    for row in mixed.result.parity:
        assert row.before is not None
        assert row.before.kl_token is not None
        assert row.after.kl_token < 0.8 * row.before.kl_token, (row.task, row.split)


def test_full_training_brings_the_reverse_kl_down(whole: Run):
    curve = [line["kl/token/mean"] for line in opd.read_metrics(whole.path)]
    assert curve[-1] < 0.9 * curve[0]


def test_on_step_sees_every_update_in_order_with_the_values_on_disk(mixed: Run):
    assert [r.step for r in mixed.reports] == list(range(1, 41))
    assert [{"step": r.step, **r.values} for r in mixed.reports] == opd.read_metrics(mixed.path)


def test_the_reward_callable_judges_every_response(mixed: Run):
    seen = {(p.id, response) for p, response in mixed.rewarded}
    for report in mixed.reports:
        for item in report.scored:
            assert (item.rollout.prompt.id, item.rollout.response) in seen
            assert item.rollout.reward == reward_of(item.rollout.prompt, item.rollout.response)
        rewards = [item.rollout.reward for item in report.scored]
        assert report.values["reward/mean"] == pytest.approx(np.mean(rewards))
    evaluated = {row.task: row.after for row in mixed.result.parity if row.split == "train"}
    assert all(cell.correct is not None and 0 <= cell.correct <= cell.total == 4 for cell in evaluated.values())


def test_without_a_reward_callable_the_tasks_own_verifier_judges(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=1, optimizer={"warmup_steps": 0}, evaluation={"num_prompts": 0})
    tree["tasks"]["second"]["verifier"] = "none"
    opd.train(opd.parse_config(tree))
    rewards = {s.rollout.prompt.task: s.rollout.reward for s in opd.read_rollouts(tree["output"])}
    assert rewards == {"first": 0.0, "second": None}
    [line] = opd.read_metrics(tree["output"])
    assert line["reward/first/mean"] == line["reward/mean"] == 0.0
    assert "reward/second/mean" not in line


def test_every_metric_of_a_step_is_a_number_and_the_phases_fill_its_time(mixed: Run):
    lines = opd.read_metrics(mixed.path)
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line in lines:
        assert all(np.isfinite(value) for value in line.values())
        phases = sum(line[f"time/{p}_s/sum"] for p in ("sample", "score", "update", "wait"))
        assert phases == pytest.approx(line["time/step_s/sum"], rel=1e-6)
        assert line["batch/rollouts/sum"] == 8


def test_a_run_folder_holds_what_its_contract_lists(mixed: Run):
    names = {p.name for p in mixed.path.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "before.json",
        "parity.json",
        "parity.md",
        "curves.png",
        "student",
        "alarms.jsonl",
        "own_code.txt",  # this run has a reward function
        ".lock",
    }
    assert not [p for p in mixed.path.rglob("*") if "partial" in p.name]
    config = json.loads((mixed.path / "config.json").read_text())
    assert opd.parse_config(config) == opd.parse_config(mixed.tree)
    assert len(list((mixed.path / "rollouts").iterdir())) == 40
    # One every 7 steps and one at the end, the newest 3 kept.
    kept = [p.name for p in checkpoint.list_checkpoints(mixed.path / "checkpoints")]
    assert kept == ["step-000028", "step-000035", "step-000040"]


def test_rollouts_read_back_exactly(mixed: Run):
    back = list(opd.read_rollouts(mixed.path))
    sampled = [item for report in mixed.reports for item in report.scored]
    assert len(back) == len(sampled) == 40 * 8
    for ours, theirs in zip(back, sampled, strict=True):
        assert not isinstance(ours.score, FailedScore)
        assert not isinstance(theirs.score, FailedScore)
        for name in ("token_ids", "loss_mask", "rollout_logprobs"):
            a, b = getattr(ours.rollout, name), getattr(theirs.rollout, name)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), name
        assert ours.score.teacher == theirs.score.teacher
        assert np.array_equal(ours.score.logprobs, theirs.score.logprobs)
        for name in ("id", "response", "reward", "finish", "policy_version", "turns"):
            assert getattr(ours.rollout, name) == getattr(theirs.rollout, name), name
    fifth = list(opd.read_rollouts(mixed.path, 5))
    assert [s.rollout.id for s in fifth] == [s.rollout.id for s in mixed.reports[4].scored]
    assert {s.rollout.policy_version for s in fifth} == {4}


def test_a_response_of_line_separators_reads_back(tmp_path: Path):
    text = "one\u2028two\u2029three\x85four\x1cfive\x0csix\r\nseven"
    item = rollout([1, 2, 3], 2, prompt=prompt())
    item = replace(item, messages=(*item.prompt.messages, {"role": "assistant", "content": text}))
    RunFolder(tmp_path).write_rollouts(1, [scored(item, [-0.5]), scored(item, [-0.25])])
    back = list(opd.read_rollouts(tmp_path))
    assert [s.rollout.response for s in back] == [text, text]
    assert [float(s.score.logprobs[-1]) for s in back if not isinstance(s.score, FailedScore)] == [-0.5, -0.25]


def test_every_kind_of_score_reads_back_with_its_retries(tmp_path: Path):
    item = replace(
        rollout([1, 2, 3, 4], 2, prompt=prompt()),
        part=1,
        events={"failed": 1},
        flags=(Flag("tags", 2, 3),),
        opened="<think>",
    )
    plain = scored(item, [-0.5, -0.25])
    chunks = ChunkScore("t", np.array([0, 0, 0, -1.5], np.float32), np.array([-1, -1, 0, 0], np.int32), 3, {"turns": 1})
    given = [
        replace(plain, retries=3),
        replace(plain, score=chunks, retries=3),
        replace(plain, rollout=replace(item, failure="a reason"), score=FailedScore("t", "gone", lost=True), retries=3),
    ]
    RunFolder(tmp_path).write_rollouts(1, given)
    for then, now in zip(opd.read_rollouts(tmp_path), given, strict=True):
        assert then.retries == 3
        for name in ("part", "flags", "opened", "failure", "turns", "reward", "messages"):
            assert getattr(then.rollout, name) == getattr(now.rollout, name), name
        assert dict(then.rollout.events) == {"failed": 1}
        assert type(then.score) is type(now.score)
        if isinstance(then.score, FailedScore):
            assert then.score == now.score
        if isinstance(then.score, ChunkScore):
            assert then.score.chunks.tolist() == chunks.chunks.tolist()
            assert (then.score.num_bytes, dict(then.score.facts)) == (3, {"turns": 1})


def test_reading_rollouts_of_a_step_that_was_never_done_says_so(mixed: Run):
    with pytest.raises(opd.OpdError, match="has no rollouts of step 41"):
        list(opd.read_rollouts(mixed.path, 41))


def test_the_curves_are_a_picture(mixed: Run):
    data = (mixed.path / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(mixed.path / "curves.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.01


def test_the_parity_table_on_disk_is_the_one_returned(mixed: Run):
    rows = json.loads((mixed.path / "parity.json").read_text())
    assert [(r["task"], r["split"], r["teacher"]) for r in rows] == [
        ("first", "train", "even"),
        ("second", "train", "odd"),
        ("second", "held_out", "odd"),
    ]
    for row, returned in zip(rows, mixed.result.parity, strict=True):
        assert row["student_after"]["kl_token"] == returned.after.kl_token
        assert row["student_before"]["kl_sequence"] == returned.before.kl_sequence
        assert row["teacher_alone"]["correct"] == returned.expert.correct
        assert row["student_after"]["total"] == 4
    table = (mixed.path / "parity.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + len(rows)


@torch.no_grad()
def trained_logits(run: Run) -> torch.Tensor:
    """The logits of the student as its newest checkpoint has it."""
    backend = build(opd.parse_config(run.tree))
    tensors, state = newest(run.path)
    backend.learner().load_state(tensors, state["learner"])
    backend.student.network.activate(backend.student.adapter)
    return backend.student.network.base(input_ids=IDS).logits


@torch.no_grad()
def test_an_adapter_student_loads_with_peft_alone(mixed: Run):
    base = AutoModelForCausalLM.from_pretrained(mixed.tree["student"])
    before = base(input_ids=IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
        student = PeftModel.from_pretrained(base, str(mixed.path / "student")).eval()
    after = student(input_ids=IDS).logits
    torch.testing.assert_close(after, trained_logits(mixed), rtol=0, atol=1e-6)
    assert float((after - before).abs().max()) > 0.1
    base_of = json.loads((mixed.path / "student" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_of == mixed.tree["student"]


@torch.no_grad()
def test_a_whole_student_loads_with_transformers_alone(whole: Run):
    folder = whole.path / "student"
    student = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = AutoModelForCausalLM.from_pretrained(whole.tree["student"]).eval()(input_ids=IDS).logits
    after = student(input_ids=IDS).logits
    torch.testing.assert_close(after, trained_logits(whole), rtol=0, atol=1e-6)
    assert float((after - before).abs().max()) > 0.01
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(whole.tree["student"]).get_vocab()
    assert tokenizer.chat_template


def test_an_exported_student_is_a_teacher_of_the_next_run(mixed: Run, whole: Run, tmp_path: Path):
    tree = toy_recipe(tmp_path, student=mixed.tree["student"], steps=2)
    tree["teachers"] = {"even": {"adapter": f"{mixed.path}/student"}, "odd": {"model": f"{whole.path}/student"}}
    run = train(tree)
    assert opd.read_metrics(run.path)[0]["kl/token/mean"] > 0.01


def test_two_adapters_made_by_sft_teach_one_student(expert: dict[str, Any], tmp_path: Path):
    other = sft_recipe(tmp_path / "other", expert["student"], seed=3)
    (tmp_path / "other" / "answers.jsonl").write_text(
        "".join(json.dumps({"id": i, "prompt": f"Now for something else: {c}", "answer": "!"}) + "\n"
                for i, c in enumerate("abcdefgh")),
        encoding="utf-8",
    )  # fmt: skip
    opd.sft(opd.parse_config(other, kind=opd.SftConfig))
    tree = toy_recipe(tmp_path, student=expert["student"], steps=12, optimizer={"lr": 2e-2})
    tree["teachers"] = {
        "even": {"adapter": f"{expert['output']}/student"},
        "odd": {"adapter": f"{other['output']}/student"},
    }
    for key in ("path", "held_out_path"):
        other_words(tree["tasks"]["second"][key])
    for row in train(tree).result.parity:
        assert row.before is not None
        assert row.after.kl_token < 0.85 * row.before.kl_token, (row.task, row.split)


def test_sft_lowers_the_likelihood_loss_and_writes_an_adapter_that_knows_its_base(expert: dict[str, Any]):
    folder = Path(expert["output"])
    curve = [line["student/nll/mean"] for line in opd.read_metrics(folder)]
    assert len(curve) == 20
    assert curve[-1] < 0.7 * curve[0]
    facts = json.loads((folder / "student" / "opd.json").read_text())
    assert facts["base"] == expert["student"]
    assert load_file(folder / "student" / "adapter_model.safetensors")


def test_sft_scores_every_token_of_the_answer_and_its_end(tmp_path: Path):
    student = save_toy(tmp_path / "base", 0)
    tree = sft_recipe(tmp_path, student, steps=1, batch_size=3, optimizer={"warmup_steps": 0})
    write_prompts(tmp_path / "answers.jsonl", 3)
    opd.sft(opd.parse_config(tree, kind=opd.SftConfig))
    tokenizer, model = AutoTokenizer.from_pretrained(student), AutoModelForCausalLM.from_pretrained(student).eval()
    losses = []
    for line in (tmp_path / "answers.jsonl").read_text().splitlines():
        record = json.loads(line)
        head = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(f"{head}{record['answer']}<|im_end|>", return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        losses += [-float(logprobs[t - 1, ids[0, t]]) for t in (ids.shape[1] - 2, ids.shape[1] - 1)]
    [line] = opd.read_metrics(tree["output"])
    assert line["student/nll/mean"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert line["loss/total/sum"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_opd_check_passes_on_a_sound_recipe_without_writing(mixed: Run, tmp_path: Path):
    tree = mixed.tree | {"output": str(tmp_path / "never")}
    findings = opd.Trainer(opd.parse_config(tree)).check()
    assert len(findings) >= 7
    assert [f for f in findings if not f.passed] == []
    names = " ".join(f.name for f in findings)
    assert all(word in names for word in ("KL 0", "forward passes", "deterministic", "'even'", "'odd'", "contexts"))
    assert not (tmp_path / "never").exists()


def test_opd_check_finds_a_teacher_that_lost_its_weights(tmp_path: Path):
    tree = toy_recipe(tmp_path)
    tree["teachers"]["odd"]["model"] = save_toy(tmp_path / "empty", 2, scale=0.0)
    failed = [f.name for f in opd.Trainer(opd.parse_config(tree)).check() if not f.passed]
    assert failed == ["teacher 'odd' is not uniform"]
    with pytest.raises(opd.OpdError, match="teacher 'odd' is not uniform"):
        opd.train(opd.parse_config(tree))


def test_evaluating_a_run_writes_its_parity_table_anew(mixed: Run, tmp_path: Path):
    copy = shutil.copytree(mixed.path, tmp_path / "copy")
    for name in ("parity.json", "parity.md"):
        (copy / name).write_text("gone")
    rows = opd.Trainer(copy, reward=reward_of).evaluate()
    assert rows == list(mixed.result.parity)
    for name in ("parity.json", "parity.md", "metrics.jsonl", "before.json"):
        assert (copy / name).read_bytes() == (mixed.path / name).read_bytes(), name


def test_evaluating_a_run_leaves_the_metrics_of_steps_after_its_checkpoint(mixed: Run, tmp_path: Path):
    copy = shutil.copytree(mixed.path, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "step-000040")  # as of a run that goes on, or was killed
    before = (copy / "metrics.jsonl").read_bytes()
    opd.Trainer(copy, reward=reward_of).evaluate()
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_evaluating_a_folder_without_a_checkpoint_is_refused(mixed: Run, tmp_path: Path):
    copy = shutil.copytree(mixed.path, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    before = {p: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    with pytest.raises(opd.OpdError, match="no checkpoint"):
        opd.Trainer(copy, reward=reward_of).evaluate()
    assert {p: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before


def test_a_run_without_evaluation_has_no_parity_table(tmp_path: Path):
    run = train(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0}))
    assert run.result.parity == ()
    assert not {"parity.json", "parity.md", "before.json"} & {p.name for p in run.path.iterdir()}


def test_another_seed_gives_other_rollouts_and_another_student(tmp_path: Path):
    def weights(seed: int) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        path = tmp_path / str(seed)
        quick = {"steps": 2, "evaluation": {"num_prompts": 0}, "output": str(path), "seed": seed}
        opd.train(opd.parse_config(toy_recipe(tmp_path, **quick)))
        tokens = [s.rollout.token_ids.tolist() for s in opd.read_rollouts(path, 1)]
        return tokens, load_file(path / "student" / "adapter_model.safetensors")

    (first, ours), (second, theirs) = weights(0), weights(1)
    assert first != second
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_folder_that_another_process_trains_in_is_refused(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", opd.parse_config(toy_recipe(tmp_path)))
    with (
        folder.locked(),
        pytest.raises(opd.OpdError, match=f"another process trains in run folder '{folder.path}'"),
        RunFolder(folder.path).locked(),
    ):
        pass
    with RunFolder(folder.path).locked():  # released
        pass
