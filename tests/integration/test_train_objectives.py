"""Every objective from a recipe to a trained student, on toy models."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import save_toy, toy_recipe, write_prompts

import opd

OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward_kl": {"type": "exact", "divergence": "forward_kl"},
    "jsd": {"type": "exact", "divergence": "jsd"},
    "top_k": {"type": "top_k", "top_k": 8},
    "support, unbiased": {"type": "top_k", "top_k": 4, "tail_residual": True},
    "exact_to_go": {"type": "exact_to_go", "discount": 0.9, "baseline": "leave_one_out"},
    "kl_to_go": {"type": "kl_to_go", "discount": 0.5, "baseline": "leave_one_out"},
    "immediate, b*": {"type": "immediate", "baseline": "score_weighted"},
    "immediate, corrected": {"type": "immediate", "correction": {"type": "reject", "level": "geometric"}},
    "dual clip": {"type": "immediate", "baseline": "kl", "loss": "ppo", "clip_dual": 3.0, "epochs": 2},
}


def quick(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two tasks with prompts of their own, so that following one teacher does not undo the other."""
    tree = toy_recipe(
        folder,
        **{
            "steps": 25,
            "sampling": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 3},
            "optimizer": {"lr": 2e-2},
            "evaluation": {"num_prompts": 12},
        }
        | changes,
    )
    path = Path(tree["tasks"]["second"]["path"])
    path.write_text(path.read_text().replace("say", "SPELL"))
    return tree


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_brings_the_reverse_kl_down(tmp_path: Path, name: str):
    result = opd.train(opd.parse_config(quick(tmp_path, objective=OBJECTIVES[name])))
    for row in result.parity:
        if row.split == "train":
            assert row.before is not None
            assert row.before.kl_token is not None
            assert row.after.kl_token is not None
            assert row.after.kl_token < 0.95 * row.before.kl_token, row.task


def test_several_teachers_on_one_prompt_from_a_recipe_to_the_table(tmp_path: Path):
    tree = quick(tmp_path)
    tree["teachers"]["both"] = {"weights": {"even": 1.0, "odd": 1.0}}
    tree["tasks"] = {
        "merged": {"type": "file", "path": write_prompts(tmp_path / "merged.jsonl"), "teacher": "both"},
    }
    result = opd.train(opd.parse_config(tree))
    [row] = result.parity
    assert row.expert is None  # two teachers at once are nobody who could answer
    assert row.parity is None
    assert row.before is not None
    assert row.before.kl_token is not None
    assert row.after.kl_token is not None
    assert row.after.kl_token < 0.95 * row.before.kl_token
    assert "| both |" not in (result.run / "parity.md").read_text()
    assert json.loads((result.run / "parity.json").read_text())[0]["teacher_alone"] is None
    assert "kl/token/both/mean" in opd.read_metrics(result.run)[0]
    again = opd.Trainer(result.run).evaluate()
    assert again[0].after == row.after


def test_an_extrapolated_run_trains_past_its_teacher_and_is_measured_against_it(tmp_path: Path):
    objective = {"type": "exact", "extrapolation": 1.5, "reference": "student"}
    result = opd.train(opd.parse_config(quick(tmp_path, objective=objective)))
    for row in result.parity:
        assert row.expert is not None
        assert row.after.kl_token is not None
        assert row.after.kl_token > 0  # to the teacher itself, where the target's would be unnormalised


def test_a_reference_that_is_the_prompts_own_teacher_is_refused(tmp_path: Path):
    tree = quick(tmp_path, objective={"extrapolation": 1.5, "reference": "even"})
    with pytest.raises(opd.OpdError, match="its teacher 'even' is the reference of objective"):
        opd.train(opd.parse_config(tree))


def truncation_masked(folder: Path) -> dict[str, Any]:
    tree = quick(folder, mask={"format_errors": "trajectory"}, steps=2)
    for task in tree["tasks"].values():
        task["checks"] = {"rules": ["truncated"]}
    return tree


def test_a_batch_of_which_nothing_is_left_makes_no_update(tmp_path: Path):
    tree = truncation_masked(tmp_path) | {"evaluation": {"num_prompts": 0}}
    tree["sampling"] |= {"max_new_tokens": 1, "prompts_per_step": 1, "group_size": 1}
    run = opd.train(opd.parse_config(tree)).run
    for line in opd.read_metrics(run):
        [item] = opd.read_rollouts(run, line["step"])
        assert ("update/skipped/sum" in line) == (item.rollout.finish == "length")
        assert ("optim/lr/max" in line) != ("update/skipped/sum" in line)


def test_truncated_responses_are_masked_and_counted(tmp_path: Path):
    run = opd.train(opd.parse_config(truncation_masked(tmp_path))).run
    for line in opd.read_metrics(run):
        cut = [s.rollout for s in opd.read_rollouts(run, line["step"]) if s.rollout.finish == "length"]
        assert line["mask/rollouts/sum"] == len(cut) > 0
        assert line["mask/tokens/sum"] == sum(r.num_actions for r in cut)
        assert all([f.rule for f in r.flags] == ["truncated"] for r in cut)


def test_a_discount_close_to_one_warns_with_the_branch_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    objective = {"type": "exact_to_go", "discount": 0.95, "baseline": "leave_one_out"}
    opd.train(opd.parse_config(quick(tmp_path, objective=objective, steps=2) | {"evaluation": {"num_prompts": 0}}))
    assert "warning: with objective.discount = 0.95" in capsys.readouterr().out


def test_a_prompts_meta_reads_back(tmp_path: Path):
    tree = quick(tmp_path, steps=2)
    records = [{"id": str(i), "prompt": f"say {i}", "meta": {"level": i, "tags": ["a"]}} for i in range(8)]
    path = tmp_path / "meta.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    tree["tasks"]["first"]["path"] = str(path)
    run = opd.train(opd.parse_config(tree | {"evaluation": {"num_prompts": 0}})).run
    mine = [s.rollout.prompt for s in opd.read_rollouts(run) if s.rollout.prompt.task == "first"]
    assert mine
    assert all(dict(p.meta) == {"level": int(p.id.split(":")[-1]), "tags": ["a"]} for p in mine)


def test_a_part_of_a_mixture_and_a_reference_are_checked_by_themselves(tmp_path: Path):
    tree = quick(tmp_path)
    broken = save_toy(tmp_path / "broken", 3, scale=0.0)  # a teacher that lost its weights scores every token alike
    tree["teachers"]["broken"] = {"model": broken}
    tree["teachers"]["both"] = {"weights": {"even": 3.0, "broken": 1.0}}
    tree["tasks"]["first"]["teacher"] = "both"
    failed = [f.name for f in opd.Trainer(opd.parse_config(tree)).check() if not f.passed]
    assert failed == ["teacher 'broken' is not uniform"]
    del tree["teachers"]["both"], tree["teachers"]["even"]
    tree["tasks"]["first"]["teacher"] = "odd"
    tree["objective"] = {"extrapolation": 1.5, "reference": "broken"}
    failed = [f.name for f in opd.Trainer(opd.parse_config(tree)).check() if not f.passed]
    assert failed == ["teacher 'broken' is not uniform"]
