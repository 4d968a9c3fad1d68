"""The command line: `opd train | sft | eval | check | align | theory | cluster plan`.

What a user can fix ends with one line on stderr and exit code 2; an interrupted run with 130.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from opd.errors import ConfigError, OpdError, one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation of language models.",
)

cluster = typer.Typer(no_args_is_help=True, help="What a cluster is asked for, before there is one.")
app.add_typer(cluster, name="cluster")

Recipe = Annotated[Path, typer.Argument(help="A TOML recipe; recipes/ holds some.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value pairs, such as optimizer.lr=1e-5", metavar="[KEY=VALUE]...")
]

_RECIPE_OR_RUN = "give a recipe, or --resume RUN (which uses the recipe that the run was started with)"


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A TOML recipe; recipes/ holds some. None with --resume.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder from its newest checkpoint.")] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="With --resume: optimizer.*, evaluation.* and detectors.* may change."),
    ] = False,
) -> None:
    """Distil one or several teachers into a student, on the student's own samples.

    With --resume RUN and no recipe, KEY=VALUE pairs say where and how the run goes on, such as a server's new address:
    docs/distributed.md, "Going on elsewhere", lists what may change.
    """
    with _one_line():
        if resume is not None:
            from opd.trainer import Trainer

            pairs = [*([recipe] if recipe is not None else []), *(overrides or [])]
            if recipe is not None and recipe.endswith(".toml"):
                raise ConfigError(f"{_RECIPE_OR_RUN}, got both: '{recipe}'")
            result = Trainer(resume).resume(pairs, allow_changes=allow_changes)
        elif recipe is None:
            raise ConfigError(_RECIPE_OR_RUN)
        elif allow_changes:
            raise ConfigError("--allow-changes belongs to --resume RUN")
        else:
            from opd.config import load_config

            config = load_config(recipe, overrides or [])
            from opd.trainer import Trainer

            result = Trainer(config).fit()
    if not result.finished:
        raise typer.Exit(130)
    typer.echo(f"done: {result.run} (student in {result.run / 'student'})")


@app.command()
def sft(
    recipe: Annotated[
        str | None, typer.Argument(help="A TOML recipe; recipes/ holds some. None with --resume.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder from its newest checkpoint.")] = None,
) -> None:
    """Fine-tune a student on reference answers: how experts are made."""
    with _one_line():
        if resume is not None:
            if recipe is not None:
                what = f"'{recipe}' has no effect" if "=" in recipe else f"got both: '{recipe}'"
                raise ConfigError(f"{_RECIPE_OR_RUN}, {what}")
            from opd.finetune import resume_sft

            result = resume_sft(resume)
        elif recipe is None:
            raise ConfigError(_RECIPE_OR_RUN)
        else:
            from opd.config import SftConfig, load_config

            config = load_config(recipe, overrides or [], kind=SftConfig)
            from opd.finetune import sft as tune

            result = tune(config)
    if not result.finished:
        raise typer.Exit(130)
    typer.echo(f"done: {result.run} (student in {result.run / 'student'})")


@app.command(name="eval")
def evaluate(
    source: Annotated[Path, typer.Argument(help="A run folder, or a recipe: then its student as it is.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="evaluation.num_prompts, and where it runs, as for --resume", metavar="[KEY=VALUE]..."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="A run's checkpoint of this step, instead of its newest.")] = None,
    student: Annotated[
        Path | None, typer.Option(help="With a recipe: an adapter's folder, or a model, to evaluate as the student.")
    ] = None,
) -> None:
    """Evaluate a student and its teachers, and print the parity table."""
    with _one_line():
        from opd.trainer import Trainer

        if (source / "config.json").is_file():
            if student is not None:
                raise ConfigError(f"--student belongs to a recipe, got the run '{source}'; its student is evaluated")
            Trainer(source).evaluate(overrides or [], step=step)
            return
        if step is not None:
            raise ConfigError(f"--step belongs to a run folder, and '{source}' is none")
        from opd.config import load_config

        chosen = [] if student is None else [_as_student(student)]
        Trainer(load_config(source, [*(overrides or []), *chosen])).evaluate()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path, typer.Option(help="The folder to write; default: RUN/export.")] = Path(),
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step, instead of the newest.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="A whole model, with the adapter in its weights.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16, of the merged weights.")] = None,
) -> None:
    """Write the student of any checkpoint of a run, as an adapter or as a whole model."""
    with _one_line():
        from opd.trainer import Trainer

        target = run / "export" if output == Path() else output
        typer.echo(f"done: {Trainer(run).export(target, step=step, merged=merged, dtype=dtype)}")


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run every start-up check of a recipe, without training."""
    with _one_line():
        from opd.config import load_config

        config = load_config(recipe, overrides or [])
        from opd.trainer import Trainer

        findings = Trainer(config).check()
    for finding in findings:
        verdict = ("warn" if finding.warning else "ok  ") if finding.passed else "FAIL"
        typer.echo(f"{verdict}  {finding.name}: {finding.detail}")
    if not all(f.passed for f in findings):
        raise typer.Exit(2)


@app.command()
def align(
    student: Annotated[str, typer.Option(help="A hub id, a folder or a GGUF file; its tokenizer is read.")],
    teacher: Annotated[str, typer.Option(help="Likewise.")],
    text: Annotated[Path | None, typer.Option(help="A text file, read as one response.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="A run folder: what its student sampled.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the two sides.")] = False,
) -> None:
    """Show how a teacher with another tokenizer reads what the student writes, before any training."""
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
    overrides: Overrides = None,
    probe: Annotated[
        Path | None, typer.Option(help="A recipe: measure every estimator on its student and teachers instead.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for tables, JSON and pictures.")] = Path("runs/theory"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Run the claims of the theory as experiments on small trees; exit code 1 when one fails."""
    with _one_line():
        if probe is not None:
            typer.echo(_probe(probe, overrides or [], output, as_json=as_json))
            return
        if overrides:
            raise ConfigError(f"'{overrides[0]}': key=value pairs belong to --probe RECIPE")
        failed = _claims(output, as_json=as_json)
    if failed:
        raise typer.Exit(1)


@cluster.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="How many: one plan for each, such as 8,64,512.")] = "8",
    gpu: Annotated[str, typer.Option(help="a100-80, h100, h200 or b200.")] = "h100",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt; data is not read.")] = 512,
    network: Annotated[float, typer.Option(min=0.1, help="GB/s of each GPU between nodes, one direction.")] = 50.0,
) -> None:
    """Estimate placement, memory and step time of a distributed recipe from its models' shapes; nothing is run or measured."""
    with _one_line():
        from opd.config import load_config

        config = load_config(recipe, overrides or [])
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


@contextmanager
def _one_line() -> Iterator[None]:
    """One line and exit code 2 for what the user can fix; anything else is a bug and keeps its traceback.

    The notes of an error are part of its line: they say how a run goes on.
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
