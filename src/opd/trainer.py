"""`Trainer`: what a user of the Python API, and the command line, does with a recipe or a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeAlias

from opd.callbacks import Callback, Callbacks
from opd.checkpoint import list_checkpoints
from opd.checks.notices import Finding
from opd.checks.quantised import quantised_findings
from opd.checks.startup import run_checks
from opd.config import Config, continued_config, parse_config, read_recipe, resumed_config
from opd.data.tasks import PythonPrompts, TaskData, read_tasks
from opd.episodes.player import MakeEnvironment
from opd.errors import ConfigError, RunError
from opd.evaluate import ParityRow
from opd.logging.run_folder import RunFolder
from opd.logging.writers import require_installed
from opd.loop import StepReport
from opd.rewards.reward import Reward
from opd.run import Result, Run, export_student, make_backend

Recipe: TypeAlias = "str | Path | Mapping[str, Any] | Config"
OnExists: TypeAlias = Literal["error", "resume", "overwrite"]
EveryCallback: TypeAlias = "Callback | Callable[[StepReport], Any]"


class Trainer:
    """On-policy distillation of one student.

    Args:
        config: A recipe (a path, a dict, or a `Config`), or the folder of a run.
        prompts: Any iterable of records (dicts as in a prompt file, texts, or `opd.Prompt`), such as a list or a
            `datasets.Dataset`. They take the place of the recipe's tasks. Their settings (`teacher`, `columns`, `verifier`, ...)
            stand in one table of [tasks] with `type = "python"`.
        held_out_prompts: Prompts that are evaluated and never trained on.
        reward: (prompt, response) -> a number in [0, 1], or None for no verdict. It takes the place of every task's own verifier.
            It may be a coroutine function: opd then awaits the rewards of a step together.
        environment: prompt -> an `opd.Environment` for one episode, or None for a single turn.
        teachers: By name, added to those of the recipe: a model (hub id, folder, GGUF file), a folder with an adapter of the
            student's base, the URL of a server, or a dict of settings.
        callbacks: `opd.Callback` objects, or functions that get the report of each step.
        if_exists: If the run folder exists, "error" refuses it, "resume" continues it, and "overwrite" deletes it if only opd
            wrote in it.

    Raises:
        OpdError: For arguments or a recipe that cannot be used, with one line that says what to write instead.

    A run folder cannot hold Python objects. To continue or evaluate a run of your own prompts, reward or environment, pass them
    again: `opd.Trainer("runs/mine", prompts=prompts, reward=reward).resume()`. opd compares the prompts with those of the start.
    """

    def __init__(
        self,
        config: Recipe,
        *,
        prompts: Iterable[Any] | None = None,
        held_out_prompts: Iterable[Any] | None = None,
        reward: Reward | None = None,
        environment: MakeEnvironment | None = None,
        teachers: Mapping[str, Any] | None = None,
        callbacks: Sequence[EveryCallback] = (),
        if_exists: OnExists = "error",
    ) -> None:
        self._passed = None
        if prompts is not None:
            self._passed = PythonPrompts(_kept(prompts), None if held_out_prompts is None else _kept(held_out_prompts))
        if held_out_prompts is not None and prompts is None:
            raise ConfigError("held_out_prompts works only together with prompts; pass prompts too")
        if if_exists not in ("error", "resume", "overwrite"):
            raise ConfigError(f"if_exists = {if_exists!r}, expected 'error', 'resume' or 'overwrite'")
        self._reward, self._environment = reward, environment
        self._callbacks = tuple(callbacks)
        Callbacks(self._callbacks)  # a wrong one is refused before anything is loaded
        self._if_exists = if_exists
        self._folder: RunFolder | None = None
        self._config: Config | None = None
        if isinstance(config, str | Path) and not is_recipe(config):
            self._folder = RunFolder.open(config)
            if teachers:
                raise ConfigError(
                    "teachers works only with a new run; to move a run's teachers, pass their new keys to resume(overrides)"
                )
        else:
            self._config = _configured(config, teachers or {}, python=self._passed is not None)

    @property
    def config(self) -> Config:
        """The recipe, or that of the run."""
        return self._config if self._config is not None else self._existing().config()

    def fit(self) -> Result:
        """Train, from a fresh run folder to the parity table.

        If the run ends early, for any reason, its last whole step is saved, and the error says how to continue.

        Raises:
            OpdError: For a failed start-up check, or an error that you can fix.
        """
        folder = RunFolder(Path(self.config.output))
        if self._folder is not None:
            raise RunError(f"'{self._folder.path}' already contains a run; continue it with Trainer(...).resume()")
        if (folder.path / "config.json").is_file():
            if self._if_exists == "resume":
                with folder.locked():
                    return self._continue(folder, self._config_of(folder))
            if self._if_exists == "overwrite":
                folder.require_removable()
                _require_outside(self.config, folder.path)
                require_installed(self.config.logging.writers)
                return self._run(self.config, folder, own_code=self._own_code()).go(resume=False, replace=True)
        require_installed(self.config.logging.writers)
        RunFolder.require_absent(self.config.output)
        return self._run(self.config, folder, own_code=self._own_code()).go(resume=False)

    def resume(self, overrides: Sequence[str] = (), *, allow_changes: bool = False) -> Result:
        """Continue the run from its newest whole checkpoint. The result is that of a run that was never stopped.

        Args:
            overrides: Keys that change where and how it continues, such as `"teachers.math.url=http://10.0.0.8:8000"` or
                `"steps=200"`. config.json holds them from then on.
            allow_changes: Also accept keys that change what is learnt from here on: [optimizer], [evaluation] and [detectors].
                `changes.jsonl` in the run folder keeps these changes.

        Raises:
            ConfigError: For any other key.
        """
        folder = self._existing()
        with folder.locked():  # before anything is read, which another process may be changing
            config = self._config_of(folder, allow_changes=allow_changes)
            return self._continue(folder, resumed_config(config, overrides, allow_changes=allow_changes))

    def evaluate(self, overrides: Sequence[str] = (), *, step: int | None = None) -> list[ParityRow]:
        """The parity table of the run's student in its newest checkpoint, or in that of `step`.

        It is written to the run folder: to parity.json, or to evaluations/ for a `step`. Without a run, the recipe's student is
        evaluated untrained, and nothing is written.

        Args:
            overrides: As for `resume`, and `evaluation.num_prompts`. config.json stays as it is.
            step: The step of a checkpoint.
        """
        folder = self._folder or RunFolder(Path(self.config.output))
        if not (folder.path / "config.json").is_file():
            if overrides or step is not None:
                raise RunError(f"'{folder.path}' is no run folder: overrides and step work only with a run")
            return self.evaluate_untrained()
        folder.require_own_code(self._own_code())
        config = resumed_config(folder.config(), overrides, evaluation=True)
        _require_adapters(config, folder)
        _require_evaluation(config, f"run '{folder.path}'")
        _require_checkpoint(folder)
        return self._run(config, folder).evaluate(step)

    def evaluate_untrained(self) -> list[ParityRow]:
        """The parity table of the recipe's untrained student. Nothing is written, and a run folder is ignored."""
        _require_evaluation(self.config, f"the recipe of '{self.config.student}'")
        return self._run(self.config, RunFolder(Path(self.config.output))).evaluate_untrained()

    def export(
        self, output: str | Path, *, step: int | None = None, merged: bool = False, dtype: str | None = None
    ) -> Path:
        """Write the student of the newest checkpoint, or of `step`, to a folder.

        Args:
            output: The folder, empty or absent.
            step: The step of a checkpoint.
            merged: Write a whole Hugging Face model instead of a PEFT adapter.
            dtype: The data type of a whole model: "float32" or "bfloat16".

        Returns:
            The folder.
        """
        folder = self._existing()
        target = Path(output)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunError(f"'{target}' exists and is not empty; choose another folder")
        if dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"dtype = '{dtype}', expected 'float32' or 'bfloat16'")
        _require_checkpoint(folder)
        export_student(folder.config(), folder, target, step, merged=merged, dtype=dtype)
        return target

    def check(self) -> list[Finding]:
        """Run every start-up check, without training.

        Returns:
            The findings, with their figures. Some may have failed.

        Raises:
            DataError: For a record that no run could use.
        """
        task_data = self._task_data(self.config)
        with closing(make_backend(self.config.started(), task_data.make_environment)) as backend:
            findings = run_checks(self.config, backend, task_data)
            prompts = [p for splits in task_data.prompts.values() for p in splits["train"]]
            return findings + quantised_findings(backend, prompts, max_tokens=self.config.compute.max_tokens)

    def _continue(self, folder: RunFolder, config: Config) -> Result:
        folder.require_own_code(self._own_code())
        _require_adapters(config, folder)
        require_installed(config.logging.writers)
        return self._run(config, folder).go(resume=True)

    def _config_of(self, folder: RunFolder, *, allow_changes: bool = False) -> Config:
        """The configuration of a run, with what the trainer's own recipe says otherwise. Raises ConfigError where it may not."""
        before = folder.config()
        if self._config is None:
            return before
        return continued_config(before, self._config, folder.first_values(), allow_changes=allow_changes)

    def _existing(self) -> RunFolder:
        return self._folder or RunFolder.open(self.config.output)

    def _task_data(self, config: Config) -> TaskData:
        return read_tasks(config, self._reward, self._environment, passed=self._passed)

    def _run(self, config: Config, folder: RunFolder, *, own_code: Sequence[str] = ()) -> Run:
        return Run(config, folder, self._task_data(config), Callbacks(self._callbacks), own_code=own_code)

    def _own_code(self) -> list[str]:
        """The arguments that a run folder cannot hold, and that a resumed run needs again: just those."""
        held_out = self._passed is not None and self._passed.held_out is not None
        given = {
            "prompts": self._passed is not None,
            "held_out_prompts": held_out,
            "reward": self._reward is not None,
            "environment": self._environment is not None,
        }
        return [name for name, present in given.items() if present]


def is_recipe(path: str | Path) -> bool:
    """Whether a path names a recipe, and not the folder of a run."""
    return Path(path).is_file() or Path(path).suffix == ".toml"


def train(config: Recipe, **kwargs: Any) -> Result:
    """Train a recipe: `Trainer(config, **kwargs).fit()`, with the arguments of `Trainer`."""
    return Trainer(config, **kwargs).fit()


def _configured(config: Recipe, teachers: Mapping[str, Any], *, python: bool) -> Config:
    """The configuration of a new run, with the teachers and the prompts that are passed as objects."""
    if isinstance(config, Config):
        if not teachers and not python:
            return config
        tree, source = config.model_dump(mode="json"), "config"
    elif isinstance(config, Mapping):
        tree, source = _copied(config), "config"
    else:
        tree, source = read_recipe(config), str(config)
    if teachers:
        tree["teachers"] = {**tree.get("teachers", {}), **{name: _teacher(name, t) for name, t in teachers.items()}}
    if python:
        own = {name: task for name, task in tree.get("tasks", {}).items() if task.get("type") == "python"}
        if len(own) > 1:
            raise ConfigError(
                f"{source}: prompts would belong to several tasks ({', '.join(own)}); keep one of type 'python'"
            )
        tree["tasks"] = own or {"prompts": {"type": "python"}}
    return parse_config(tree, source=source)


def _require_outside(config: Config, folder: Path) -> None:
    """Raise RunError when the run folder that is to be replaced holds what the new run begins with."""
    paths = [config.student, config.lora.start, *(t.source for t in config.teachers.values())]
    paths += [getattr(task, key, None) for task in config.tasks.values() for key in ("path", "held_out_path")]
    for path in paths:
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            raise RunError(f"'{path}' lies in run folder '{folder}', which would be deleted; choose another output")


def _teacher(name: str, given: Any) -> dict[str, Any]:
    """The table of a teacher that is passed as one string, or as a dict."""
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str | Path):
        raise ConfigError(
            f"teachers['{name}'] is {type(given).__name__}, expected a model (hub id, folder, GGUF file), an adapter's "
            "folder, a URL, or a dict of settings"
        )
    text = str(given)
    if text.startswith(("http://", "https://")):
        return {"url": text}
    return {"adapter" if (Path(text) / "adapter_config.json").is_file() else "model": text}


def _kept(records: Iterable[Any]) -> Iterable[Any]:
    """The records; those of an iterator as a list, because a trainer may read them several times."""
    return list(records) if isinstance(records, Iterator) else records


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _require_adapters(config: Config, folder: RunFolder) -> None:
    """Raise RunError for a teacher's adapter that is not where it was: only a folder can be one."""
    for name, teacher in config.teachers.items():
        if teacher.adapter is not None and not Path(teacher.adapter).is_dir():
            raise RunError(
                f"run '{folder.path}': teachers.{name}.adapter = '{teacher.adapter}' is not a folder here; if it has moved, add "
                f"teachers.{name}.adapter=PATH to the command, after the run folder"
            )


def _require_evaluation(config: Config, what: str) -> None:
    if not config.evaluation.num_prompts:
        raise RunError(
            f"{what} has evaluation.num_prompts = 0; set how many prompts of each task and split to evaluate, such as "
            "evaluation.num_prompts=128"
        )


def _require_checkpoint(folder: RunFolder) -> None:
    if not list_checkpoints(folder.checkpoints):
        raise RunError(f"'{folder.path}' has no checkpoint yet; continue it with: {folder.how_to_resume()}")
