"""The command line: `opd train | sft | eval | export | check | align | theory | plan`.

An error that the user can fix ends with one line on stderr and exit code 2; an interrupted run ends with 130.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from opd import __version__
from opd.errors import ConfigError, OpdError, one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation of language models.",
)

_ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}  # every key of a recipe is an option
_RECIPE_OR_RUN = "give a recipe, or --resume RUN (which uses the recipe that the run was started with)"
_KEYS = "[KEY=VALUE]..."
_KEYS_HELP = "Then keys that replace those of the recipe: optimizer.lr=1e-5 or --optimizer.lr 1e-5."

Recipe = Annotated[
    list[str],
    typer.Argument(metavar=f"RECIPE {_KEYS}", help=f"A TOML recipe, such as recipes/merge.toml. {_KEYS_HELP}"),
]
RecipeOrKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar=f"[RECIPE] {_KEYS}", help=f"A TOML recipe; none with --resume. {_KEYS_HELP}"),
]
ResumedRun = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN", help="Continue this run folder from its newest checkpoint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"opd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    context_settings=_ANY_KEY,
    epilog="Examples:\n\n"
    "opd train recipes/sums.toml\n\n"
    "opd train recipes/sums.toml --steps 3 --optimizer.lr 1e-5\n\n"
    "opd train recipes/sums.toml student=Qwen/Qwen3-1.7B output=runs/second\n\n"
    "opd train --resume runs/second",
)
def train(
    arguments: RecipeOrKeys = None,
    resume: ResumedRun = None,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes", help="With --resume: keys of [optimizer], [evaluation] and [detectors] may change."
        ),
    ] = False,
) -> None:
    """Distil one or several teachers into a student, on the student's own samples.

    With --resume RUN, keys change where and how the run continues, such as the new address of a server.
    docs/how-to/resume-and-export.md lists the keys that may change.
    """
    with _one_line():
        recipe, overrides = _split(arguments)
        if resume is not None:
            if recipe is not None:
                raise ConfigError(f"{_RECIPE_OR_RUN}, got both: '{recipe}'")
            _announce(f"loading run {resume}")
            from opd.trainer import Trainer

            result = Trainer(resume).resume(overrides, allow_changes=allow_changes)
        elif allow_changes:
            raise ConfigError("--allow-changes works only with --resume RUN")
        else:
            from opd.config import load_config

            config = load_config(_announced(recipe), overrides)
            from opd.trainer import Trainer

            result = Trainer(config).fit()
    _finish(result.run, finished=result.finished)


@app.command(
    context_settings=_ANY_KEY, epilog="Example:\n\nopd sft recipes/expert_letters.toml --steps 100 --batch_size 16"
)
def sft(arguments: RecipeOrKeys = None, resume: ResumedRun = None) -> None:
    """Fine-tune a student on reference answers, for example to make a teacher."""
    with _one_line():
        recipe, overrides = _split(arguments)
        if resume is not None:
            if recipe is not None or overrides:
                what = f"got both: '{recipe}'" if recipe is not None else f"'{overrides[0]}' has no effect"
                raise ConfigError(f"{_RECIPE_OR_RUN}, {what}")
            _announce(f"loading run {resume}")
            from opd.finetune import resume_sft

            result = resume_sft(resume)
        else:
            from opd.config import SftConfig, load_config

            config = load_config(_announced(recipe), overrides, kind=SftConfig)
            from opd.finetune import sft as tune

            result = tune(config)
    _finish(result.run, finished=result.finished)


@app.command(name="eval", context_settings=_ANY_KEY)
def evaluate(
    source: Annotated[Path, typer.Argument(help="A run folder, or a recipe whose student is evaluated untrained.")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar=_KEYS, help="evaluation.num_prompts=N, and keys that change where it runs."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step, instead of the newest.")] = None,
    student: Annotated[
        Path | None, typer.Option(help="With a recipe: the adapter or model to evaluate as the student.")
    ] = None,
) -> None:
    """Evaluate a student and its teachers, and print the parity table."""
    with _one_line():
        overrides = _split([str(source), *(keys or [])])[1]
        is_run = not source.is_file() and source.suffix != ".toml"
        if is_run and student is not None:
            raise ConfigError(
                f"--student works only with a recipe, got the run '{source}'; opd evaluates the run's own student"
            )
        if not is_run and step is not None:
            raise ConfigError(f"--step works only with a run folder, got '{source}'")
        if is_run:
            _announce(f"loading run {source}")
            from opd.trainer import Trainer

            Trainer(source).evaluate(overrides, step=step)
            return
        from opd.config import load_config

        chosen = [] if student is None else [_as_student(student)]
        config = load_config(_announced(str(source)), [*overrides, *chosen])
        from opd.trainer import Trainer

        Trainer(config).evaluate_untrained()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write; by default RUN/export. It must be empty or absent.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step, instead of the newest.")] = None,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Write a whole Hugging Face model, with the adapter merged into its weights."),
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="With --merged: float32 (default) or bfloat16.")] = None,
) -> None:
    """Write the student of any checkpoint of a run, as an adapter or as a whole model."""
    with _one_line():
        _announce(f"loading run {run}")
        from opd.trainer import Trainer

        target = Trainer(run).export(output or run / "export", step=step, merged=merged, dtype=dtype)
        typer.echo(f"done: {target}")


@app.command(context_settings=_ANY_KEY)
def check(arguments: Recipe) -> None:
    """Run every start-up check of a recipe and print its figures, without training."""
    with _one_line():
        from opd.config import load_config

        recipe, overrides = _split(arguments)
        config = load_config(_announced(recipe), overrides)
        from opd.trainer import Trainer

        findings = Trainer(config).check()
    for finding in findings:
        typer.echo(finding)
    if not all(f.passed for f in findings):
        raise typer.Exit(2)


@app.command()
def align(
    student: Annotated[str, typer.Option(help="A hub id, a folder or a GGUF file. opd reads only its tokenizer.")],
    teacher: Annotated[str, typer.Option(help="The same for the teacher.")],
    text: Annotated[Path | None, typer.Option(help="A text file that is read as one response.")] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="A run folder, to read the responses that its student sampled.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a student's and a teacher's tokens of the same text, before any training.

    Without --text and --rollouts it reads a sample text.
    """
    with _one_line():
        if text is not None and rollouts is not None:
            raise ConfigError("give --text FILE or --rollouts RUN, not both")
        from opd.align import SAMPLE, as_plain, compare, read_text, rollouts_of, show

        found = compare(
            student,
            teacher,
            rollouts_of(rollouts) if rollouts is not None else read_text(text) if text is not None else SAMPLE,
        )
        if as_json:
            import json

            typer.echo(json.dumps(as_plain(found), indent=1, ensure_ascii=False))
        else:
            from rich.console import Console

            show(found, Console())


@app.command()
def theory(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="With --probe: keys that replace those of its recipe."),
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="A recipe whose student and teachers are measured.")] = None,
    output: Annotated[Path, typer.Option(help="The folder for tables, JSON and pictures.")] = Path("runs/theory"),
    as_json: AsJson = False,
) -> None:
    """Run the claims of the theory as experiments on small trees. The exit code is 1 if a claim fails.

    With --probe it measures every estimator on real models instead: 16 prompts, 4 responses each.
    """
    with _one_line():
        if probe is not None:
            typer.echo(_probe(probe, keys or [], output, as_json=as_json))
            return
        if keys:
            raise ConfigError(f"'{keys[0]}': key=value pairs work only with --probe RECIPE")
        failed = _claims(output, as_json=as_json)
    if failed:
        raise typer.Exit(1)


@app.command(context_settings=_ANY_KEY)
def plan(
    arguments: Recipe,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, such as 8,64,512: one plan for each.")] = "8",
    gpu: Annotated[str, typer.Option(help="The kind of GPU: a100-80, h100, h200 or b200.")] = "h100",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt. opd plan reads no data.")] = 512,
    network: Annotated[
        float, typer.Option(min=0.1, help="Network between nodes, in GB/s for each GPU and one direction.")
    ] = 50.0,
) -> None:
    """Estimate placement, memory and step time of a distributed recipe from the shapes of its models.

    Nothing is run or measured.
    """
    with _one_line():
        from opd.config import load_config

        recipe, overrides = _split(arguments)
        config = load_config(_required(recipe), overrides)
        from opd_plan.devices import Assumptions, device_of
        from opd_plan.text import gpus_of, plan_text

        assumed = Assumptions(device_of(gpu), prompt_tokens=prompt_tokens, network_gb_s=network)
        said, refused = plan_text(config, gpus_of(gpus), assumed)
        typer.echo(said)
        if refused:
            raise refused[0]


def _claims(output: Path, *, as_json: bool) -> int:
    """Run and print every claim; returns how many failed."""
    from opd_theory.report import claim_line, run_claims, write_report

    claims = []
    for claim, seconds in run_claims():
        claims.append(claim)
        if not as_json:
            typer.echo(f"{claim_line(claim)}\n            ({seconds:.1f} s)")
    files = write_report(claims, output)
    failed = sum(not claim.holds for claim in claims)
    if as_json:
        typer.echo(files[0].read_text(encoding="utf-8"))
    else:
        typer.echo(f"{len(claims) - failed} of {len(claims)} claims hold; table, figures and pictures in {output}")
    return failed


def _probe(recipe: Path, overrides: list[str], output: Path, *, as_json: bool) -> str:
    from opd.config import load_config

    config = load_config(recipe, overrides)
    from opd_theory.probe import probe, probe_text, write_probe

    found = probe(config)
    files = write_probe(found, output)
    return files[0].read_text(encoding="utf-8") if as_json else f"{probe_text(found)}\n\ntable and figures in {output}"


def _as_student(path: Path) -> str:
    """The override that makes an adapter, or a model, the student of a recipe."""
    return f"{'lora.start' if (path / 'adapter_config.json').is_file() else 'student'}={path}"


def _split(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The recipe or run folder among the arguments, if any, and the overrides; `--key value` is the override `key=value`.

    An option without a value, such as --bf16, is true.
    """
    target, overrides, left = None, [], list(arguments or [])
    while left:
        word = left.pop(0)
        if word.startswith("--"):
            value = "" if "=" in word else "=" + (left.pop(0) if left and not left[0].startswith("--") else "true")
            overrides.append(word.removeprefix("--") + value)
        elif target is None and ("=" not in word or word.endswith(".toml")):
            target = word
        else:
            overrides.append(word)
    return target, overrides


def _required(recipe: str | None) -> str:
    if recipe is None:
        raise ConfigError(_RECIPE_OR_RUN)
    return recipe


def _announced(recipe: str | None) -> str:
    """The recipe; its name is printed before slow imports start."""
    _announce(f"loading recipe {_required(recipe)}")
    return _required(recipe)


def _announce(what: str) -> None:
    typer.echo(f"opd {__version__}: {what}")


def _finish(run: Path, *, finished: bool) -> None:
    if not finished:
        raise typer.Exit(130)
    typer.echo(f"done: {run} (student in {run / 'student'})")


@contextmanager
def _one_line() -> Iterator[None]:
    """One line and exit code 2 for an error that the user can fix; any other error is a bug and keeps its traceback.

    The notes of an error are part of its line: they say how to continue a run.
    """
    try:
        yield
    except OpdError as error:
        _fail(error, str(error))
    except PermissionError as error:
        _fail(error, f"no permission for '{error.filename}'; fix the permission or choose another place")
    except OSError as error:  # the machine's own: a full disk, say
        place = f" '{error.filename}'" if error.filename else ""
        _fail(error, f"the system refuses{place}: {error.strerror or error}")
    except KeyboardInterrupt as error:
        _fail(error, "" if _notes(error) else "stopped; run the same command again", code=130)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _fail(error: BaseException, message: str, *, code: int = 2) -> None:
    print(f"opd: {one_line('; '.join(filter(None, [message, *_notes(error)])))}", file=sys.stderr)
    raise typer.Exit(code) from None


def main() -> None:
    """The entry point of the `opd` command."""
    app()
