"""Whatever ends a run, its last whole step is saved, its line says how to go on, and what the line says works."""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import sft_recipe, toy_recipe, write_toml
from toy_runs import checkpoints, follow_advice, invoke, lines_of, one_line

import opd
import opd.finetune
import opd.logging.writers
import opd.loop
import opd.run
from opd import checkpoint
from opd.errors import RunError, ScoreError
from opd.local.learner import LocalLearner
from opd.local.sampler import LocalSampler
from opd.logging.run_folder import RunFolder

STEPS = 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that saves nothing before its end by itself."""
    folder = tmp_path_factory.mktemp("bench")
    return toy_recipe(folder, steps=STEPS, checkpoint={"every": 100}, evaluation={"num_prompts": 2, "every": 2})


@pytest.fixture(scope="module")
def whole(bench: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opd.train(opd.parse_config(bench | {"output": str(tmp_path_factory.mktemp("whole") / "run")})).run


@pytest.fixture
def tree(bench: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return json.loads(json.dumps(bench)) | {"output": str(tmp_path / "a run")}  # a place that a shell would cut


def train(tree: dict[str, Any], tmp_path: Path) -> Any:
    return invoke("train", write_toml(tmp_path / "recipe.toml", tree))


def at(number: int, action: Callable[[], None], function: Any) -> Any:
    """The function, which does something else first when it is called for the `number`-th time."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            action()
        return function(*args, **kwargs)

    return counted


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dead() -> None:
    raise RunError("engine 1 of 1 of the student died and does not come back")


def bug() -> None:
    raise RuntimeError("a bug")


# where it fails -> (object, name, at which call, what happens, the step that is saved, whether it is one line)
FAILURES: dict[str, tuple[Any, str, int, Callable[[], None], int, bool]] = {
    "the rollouts' file": (RunFolder, "write_rollouts", 2, full, 3, True),  # written beside the next step
    "the metrics' file": (RunFolder, "append_metrics", 3, full, 3, True),
    "the alarms' file": (opd.run.RunMonitor, "observe", 3, dead, 3, True),
    "the console": (opd.run.ProgressLine, "step", 3, full, 3, True),
    "a sampler whose server dies": (LocalSampler, "sample", 5, dead, 2, True),
    "a sampler that takes no weights": (LocalSampler, "load_weights", 3, dead, 2, True),
    "a teacher": (opd.loop, "_judged", 3, dead, 2, True),
    "a backward pass": (LocalLearner, "forward_backward", 4, bug, 3, False),
    "a gradient that is no number": (
        LocalLearner, "optim_step", 4, lambda: (_ for _ in ()).throw(ScoreError("the gradient's norm is nan")), 3, True,
    ),
    "the picture": (opd.logging.writers, "draw_curves", 1, bug, 4, True),
    "the picture's file": (opd.logging.writers, "draw_curves", 1, full, 4, True),
    "the export": (opd.run, "draw_run", 1, dead, 4, True),
    "the table": (opd.run.Evaluator, "parity", 1, dead, 4, True),
}  # fmt: skip


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_leaves_the_last_whole_step_and_advice_that_works(
    tree: dict[str, Any], whole: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
):
    place, name, number, action, step, said = FAILURES[where]
    if where == "a sampler whose server dies":
        number = 1 + 3 + 2 + 1  # checks; three sets before the first step; two steps and what is measured behind them
    monkeypatch.setattr(place, name, at(number, action, getattr(place, name)))
    run = Path(tree["output"])
    result = train(tree, tmp_path)
    monkeypatch.undo()
    if isinstance(result.exception, SystemExit):
        line = one_line(result)
    else:
        [line] = getattr(result.exception, "__notes__", [])
        assert not said
    saved = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoints(run) == [f"step-{step:06d}"], line
    assert len(saved) == 1
    assert ("curves.png" in line) == ("picture" in where)
    assert f"{'all 4 steps are' if step == STEPS else f'step {step} is'} saved" in line
    follow_advice(line, run)
    assert_same_run(run, whole)


def assert_same_run(run: Path, whole: Path) -> None:
    assert lines_of(run) == lines_of(whole)
    for step in range(1, STEPS + 1):
        name = f"rollouts/step-{step:06d}.jsonl.gz"
        assert (run / name).read_bytes() == (whole / name).read_bytes()


class Writer:
    """A writer that fails at a step, or when it is closed."""

    def __init__(self, fails: int | None) -> None:
        self.fails = fails

    def write(self, step: int, values: Any) -> None:
        if step == self.fails:
            full()

    def close(self) -> None:
        if self.fails is None:
            full()


@pytest.mark.parametrize("fails", [0, 3, None], ids=["when made", "in a step", "when closed"])
def test_a_writer_that_fails_is_named_and_the_run_goes_on_without_it(
    tree: dict[str, Any], whole: Path, tmp_path: Path, fails: int | None, monkeypatch: pytest.MonkeyPatch
):
    def make(*args: Any) -> Writer:
        if fails == 0:
            full()
        return Writer(fails)

    monkeypatch.setattr("opd.logging.writers._make", make)
    monkeypatch.setattr("opd.trainer.require_installed", lambda names: None)
    line = one_line(train(tree | {"logging": {"writers": ["tensorboard"]}}, tmp_path))
    assert line.startswith("opd: logging.writers: 'tensorboard' fails: OSError: [Errno 28] No space left on device;")
    advised = re.search(r"add '(logging.writers=\S*)' to", line)
    assert advised
    run = Path(tree["output"])
    assert checkpoints(run) == {0: [], 3: ["step-000003"], None: ["step-000004"]}[fails]
    follow_advice(line, run, advised[1])
    assert_same_run(run, whole)


@pytest.mark.parametrize("kind", ["an error", "an exit", "an async error"])
def test_a_callback_that_fails_leaves_a_note_and_the_step_that_it_saw(
    tree: dict[str, Any], whole: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    error: BaseException = SystemExit(1) if kind == "an exit" else KeyError("mine")

    def on_step(report: Any) -> None:
        if report.step == 3:
            raise error

    async def later(report: Any) -> None:
        on_step(report)

    with pytest.raises(type(error)) as found:
        opd.train(opd.parse_config(tree), callbacks=[later if kind == "an async error" else on_step])
    assert found.value is error
    said = capsys.readouterr().out.splitlines()[-1] if kind == "an exit" else error.__notes__[-1]
    follow_advice(said, Path(tree["output"]))
    assert_same_run(Path(tree["output"]), whole)


# Signals


def press(times: int) -> Callable[[], None]:
    def pressed() -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    return pressed


PHASES: dict[str, tuple[Any, str, int, int]] = {
    "while it samples": (opd.loop, "score_usable", 3, 2),
    "before the update": (opd.loop, "_judged", 3, 2),
    "while the weights move": (LocalSampler, "load_weights", 4, 3),
    "while the step is recorded": (RunFolder, "append_metrics", 3, 3),
    "while it is measured": (opd.run.Evaluator, "held_out", 3, 3),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_any_phase_saves_the_last_whole_step_and_says_how_to_go_on(
    tree: dict[str, Any], whole: Path, tmp_path: Path, phase: str, times: int, monkeypatch: pytest.MonkeyPatch
):
    place, name, number, step = PHASES[phase]
    monkeypatch.setattr(place, name, at(number, press(times), getattr(place, name)))
    result = train(tree, tmp_path)
    monkeypatch.undo()
    assert result.exit_code == 130, result.output
    run = Path(tree["output"])
    step = 3 if times == 1 else step  # one lets the step end
    assert checkpoints(run) == [f"step-{step:06d}"]
    said = result.stderr if times == 2 and phase != "while the weights move" else result.stdout
    line = said.splitlines()[-1]
    assert f"stopped after step {step} of {STEPS}; continue with: opd train --resume " in line
    follow_advice(line, run)
    assert_same_run(run, whole)


def test_ctrl_c_while_the_last_step_is_saved_ends_the_run_before_its_evaluation(
    tree: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint, "save", at(1, press(1), checkpoint.save))
    result = train(tree, tmp_path)
    monkeypatch.undo()
    run = Path(tree["output"])
    assert result.exit_code == 130
    assert not (run / "parity.json").exists()
    line = result.stdout.splitlines()[-1]
    assert line.startswith(f"stopped after step {STEPS} of {STEPS}; continue with: ")
    follow_advice(line, run)
    assert_same_run(run, whole)


def test_a_third_ctrl_c_stops_without_saving(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree |= {"checkpoint": {"every": 2}}
    save = checkpoint.save

    def interrupted(folder: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return save(folder, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    monkeypatch.setattr(RunFolder, "append_metrics", at(3, press(2), RunFolder.append_metrics))
    result = train(tree, tmp_path)
    monkeypatch.undo()
    assert result.exit_code == 130
    [line] = result.stderr.splitlines()
    run = Path(tree["output"])
    assert line.startswith("opd: stopped after step 2 of 4; continue with: ")
    assert checkpoints(run) == ["step-000002"]
    follow_advice(line, run)


def test_ctrl_c_before_a_run_begins_leaves_nothing_and_says_so(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opd.run.run_checks", interrupted)
    result = train(tree, tmp_path)
    monkeypatch.undo()
    assert (result.exit_code, result.stderr) == (130, "opd: stopped; run the same command again\n")
    assert not Path(tree["output"]).exists()
    assert train(tree, tmp_path).exit_code == 0


@pytest.mark.parametrize("name", ["config.json", "own_code.txt"])
def test_a_disk_that_is_full_before_a_run_begins_leaves_the_place_free(
    tree: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
):
    write = RunFolder.write_text

    def fails(folder: RunFolder, file: str, text: str) -> None:
        if file == name:
            raise RunError("cannot write")
        write(folder, file, text)

    monkeypatch.setattr(RunFolder, "write_text", fails)
    with pytest.raises(RunError, match="cannot write"):
        opd.train(opd.parse_config(tree), reward=lambda prompt, response: 1.0)
    monkeypatch.undo()
    assert opd.train(opd.parse_config(tree), reward=lambda prompt, response: 1.0).finished


def test_ctrl_c_before_the_first_step_says_that_none_is_saved(
    tree: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opd.run.Evaluator.before", interrupted)
    result = train(tree, tmp_path)
    monkeypatch.undo()
    [line] = result.stderr.splitlines()
    assert line.startswith("opd: stopped after step 0 of 4; continue with: ")
    follow_advice(line, Path(tree["output"]))
    assert_same_run(Path(tree["output"]), whole)


# Fine-tuning


@pytest.fixture(scope="module")
def tuned(bench: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("tuned")
    tree = sft_recipe(folder, bench["student"], steps=STEPS, evaluation={"num_prompts": 2}, checkpoint={"every": 100})
    opd.sft(opd.parse_config(tree, kind=opd.SftConfig))
    return tree, Path(tree["output"])


@pytest.mark.parametrize("how", ["once", "twice", "a full disk", "a bug"])
def test_fine_tuning_that_ends_early_is_continued_as_its_line_says(
    tuned: tuple[dict[str, Any], Path], tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
):
    tree, calm = tuned
    run = tmp_path / "expert"
    action = {"once": press(1), "twice": press(2), "a full disk": full, "a bug": bug}[how]
    monkeypatch.setattr("opd.finetune.imitation_batch", at(3, action, opd.finetune.imitation_batch))
    result = invoke("sft", write_toml(tmp_path / "sft.toml", tree | {"output": str(run)}))
    monkeypatch.undo()
    step = 3 if how == "once" else 2
    assert checkpoints(run) == [f"step-{step:06d}"]
    if how == "a bug":
        [line] = result.exception.__notes__ if result.exception else []
    else:
        assert result.exit_code == (2 if how == "a full disk" else 130)
        line = (result.stdout if how == "once" else result.stderr).splitlines()[-1]
    assert "opd sft --resume" in line
    follow_advice(line, run)
    assert lines_of(run) == lines_of(calm)
    for name in ("student/adapter_model.safetensors", "curves.png"):
        assert (run / name).exists()
    files = [p / "student" / "adapter_model.safetensors" for p in (run, calm)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_fine_tuning_of_other_prompts_is_not_continued(tuned: tuple[dict[str, Any], Path], tmp_path: Path):
    tree, _ = tuned
    run = tmp_path / "expert"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(Path(tree["tasks"]["answers"]["path"]).read_bytes())
    tree = tree | {"output": str(run), "tasks": {"answers": tree["tasks"]["answers"] | {"path": str(prompts)}}}
    assert invoke("sft", write_toml(tmp_path / "sft.toml", tree)).exit_code == 0
    prompts.write_text(prompts.read_text().replace("say a", "say b"))
    assert "the training prompts of tasks.answers are not what this run began with" in one_line(
        invoke("sft", "--resume", run)
    )


def test_each_command_continues_its_own_runs(tuned: tuple[dict[str, Any], Path], whole: Path, tmp_path: Path):
    _, expert = tuned
    assert f"continue it with: opd sft --resume {expert}" in one_line(invoke("train", "--resume", expert))
    assert f"continue it with: opd train --resume {whole}" in one_line(invoke("sft", "--resume", whole))
    assert "is no run folder" in one_line(invoke("sft", "--resume", tmp_path))
    assert "give a recipe, or --resume RUN" in one_line(invoke("sft"))
    assert invoke("sft", "--resume", expert).exit_code == 0
    with pytest.raises(RunError, match="not of 'opd train'"):
        opd.Trainer(expert).resume()
    assert opd.resume_sft(expert)


def test_a_run_folder_in_the_way_is_continued_with_what_fits_it(
    tree: dict[str, Any], tuned: tuple[dict[str, Any], Path], whole: Path, tmp_path: Path
):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    for place, advice in (
        (whole, f"continue it with: opd train --resume {whole}; or choose another folder with output=..."),
        (tuned[1], f"continue it with: opd sft --resume {tuned[1]}; or choose another folder with output=..."),
        (notes, "exists and is not empty; choose another folder with output=..."),
    ):
        line = one_line(train(tree | {"output": str(place)}, tmp_path))
        assert advice in line
        assert ("--resume" in line) == (place != notes)


def test_a_run_without_a_checkpoint_is_not_evaluated_and_continued_first(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("opd.run.Evaluator.before", at(1, bug, opd.run.Evaluator.before))
    train(tree, tmp_path)
    monkeypatch.undo()
    run = Path(tree["output"])
    line = one_line(invoke("eval", run))
    assert "has no checkpoint yet; continue it with: " in line
    follow_advice(line.replace("continue it with", "continue with"), run)
    assert invoke("eval", run).exit_code == 0
