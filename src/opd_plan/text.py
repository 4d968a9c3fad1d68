"""A plan in words, tables and the settings that realise it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from opd.config import Config
from opd.errors import ConfigError
from opd_plan.devices import GIB, Assumptions
from opd_plan.memory import (
    EngineMemory,
    bytes_of,
    engine_room,
    pool_memory,
    rank_memory,
    student_memory,
    student_running,
)
from opd_plan.roofline import named_tokens
from opd_plan.search import DoesNotFit, Plan, best_plan, groups, own_plan
from opd_plan.work import Work, work_of

_DTYPES = {2: "bfloat16", 4: "float32"}


def plan_text(config: Config, gpus: Sequence[int], assumed: Assumptions) -> tuple[str, list[DoesNotFit]]:
    """What the recipe would need and take on each number of GPUs, and why it does not fit on others.

    Raises DoesNotFit when it fits on none.
    """
    work = work_of(config, prompt_tokens=assumed.prompt_tokens)
    own = own_plan(config, work, assumed)
    parts, plans, refused = [_assumptions(config, work, assumed)], [], []
    for count in gpus:
        try:
            plan = best_plan(config, work, count, assumed)
        except DoesNotFit as error:
            refused.append(error)
            parts.append(f"== no plan for {error} ==")
            continue
        plans.append(plan)
        parts.append(_one(config, work, plan, own, assumed))
    if not plans:
        raise refused[-1]
    if len(plans) > 1:
        parts.append(_compared(plans))
    return "\n\n".join(parts), refused


def gpus_of(text: str) -> list[int]:
    """Numbers of GPUs from "8,64,512". Raises ConfigError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--gpus {text!r}: expected numbers from 1 with commas between them, such as 8,64,512")
    return list(dict.fromkeys(found))


def _assumptions(config: Config, work: Work, assumed: Assumptions) -> str:
    """Everything that the numbers below rest on."""
    d, each = assumed.device, bytes_of(config)
    turns = f" in {work.turns} turns" if work.turns > 1 else ""
    rate = d.tflops(each.computed)
    remote, most = config.remote.max_in_flight, config.episodes.max_concurrent
    limit = (
        "all of a step"
        if work.in_flight == work.rollouts
        else f"episodes.max_concurrent = {most}; a larger one lets more"
    )
    lines = [
        f"a step: {work.rollouts} rollouts (groups of {work.group}), prompts of {work.prompt} tokens (--prompt-tokens), responses "
        f"of {work.response}{turns}: as long as they may be, which real ones seldom are",
        f"at once: {work.in_flight} rollouts ({limit}), at most {remote} at one engine (remote.max_in_flight)",
        f"student: {_model(config.student)}, {work.student.parameters:,} parameters, {work.trainable:,} train "
        f"({config.trainable}); {_DTYPES[each.stored]} weights, {_DTYPES[each.computed]} products",
        *_teachers(work),
        f"device: {d.name}, {rate:g} TFLOPS ({_DTYPES[each.computed]}, dense), {d.memory_gib:g} GiB at {d.memory_gb_s:g} GB/s; "
        f"{d.link_gb_s:g} GB/s one way among the {assumed.gpus_per_node} of a node, {assumed.network_gb_s:g} GB/s for each GPU "
        f"between nodes (--network), {d.host_gb_s:g} GB/s to the host",
        f"reached: {assumed.matmul_fraction:.0%} of TFLOPS, {assumed.memory_fraction:.0%} of memory bandwidth, "
        f"{assumed.link_fraction:.0%} "
        f"of links; {assumed.step_ms:g} ms more for each pass of an engine, {assumed.collective_us:g} us for each collective, "
        f"{assumed.disk_gb_s:g} GB/s for files",
        f"memory: {assumed.reserve_gib:g} GiB of each device for contexts and fragments; unless its engine_args say otherwise an "
        f"engine takes {assumed.engine_fraction:.0%} of a device, computes {d.batched_tokens} tokens a pass and runs "
        f"{d.running} sequences",
    ]
    if work.pools:
        lines.append(
            f"driver: {assumed.driver_ms:g} ms for each rollout that engines of teachers score, {assumed.driver_us:g} us for each "
            f"of its tokens and {assumed.driver_named_us:g} us for each that they name beside it ({named_tokens(config)}), while "
            "they go on"
        )
    told = [fill(line, 118, initial_indent="  ", subsequent_indent="    ") for line in lines]
    return "ESTIMATES from the assumptions below; nothing here was measured.\n\n" + "\n".join(told)


def _teachers(work: Work) -> list[str]:
    """A line for each."""
    found = []
    for pool in work.pools:
        shape = pool.shape
        found.append(
            f"teacher {', '.join(pool.names)}: {_model(shape.source)}, {shape.parameters:,} parameters at engines, "
            f"{pool.rollouts:g} rollouts a step"
        )
    for policy in work.policies:
        said = f"{_model(policy.shape.source)}, {policy.shape.parameters:,} parameters on the learner's ranks"
        found.append(f"teacher {policy.name}: {said}, {policy.rollouts:g} rollouts a step")
    found += [f"teacher {name}: behind a url, no GPU of this cluster; its time is unknown" for name in work.unknown]
    return found


def _model(source: str) -> str:
    return Path(source).name


def _one(config: Config, work: Work, plan: Plan, own: Plan | str, assumed: Assumptions) -> str:
    """One plan: placement, memory, times, settings."""
    return "\n\n".join(
        [
            f"== {plan.gpus} GPUs ({assumed.device.name}), estimated ==",
            _placement(config, work, plan),
            _memory(config, work, plan, assumed),
            _times(config, work, plan, own),
            _settings(config, work, plan),
        ]
    )


def _placement(config: Config, work: Work, plan: Plan) -> str:
    rows = [("placement", "count", "GPUs each", "GPUs"), ("learner ranks", plan.ranks, 1, plan.ranks)]
    rows.append(("engines of the student", plan.student.count, plan.student.devices, plan.student.gpus))
    for group, engines in zip(groups(config, work), plan.teachers, strict=True):
        names = ", ".join(name for pool in group for name in pool.names)
        turns = " (take turns)" if len(group) > 1 else ""
        rows.append((f"engines of {names}{turns}", engines.count, engines.devices, engines.gpus))
    rows.append(("idle", "", "", plan.idle))
    return _table(rows)


def _memory(config: Config, work: Work, plan: Plan, assumed: Assumptions) -> str:
    """Of each kind of device: its parts, what is left, and for how many sequences an engine has room there."""
    device = assumed.device.memory_gib * GIB
    rank = rank_memory(config, work, plan.ranks, assumed)
    student = student_memory(config, work, plan.student.devices, assumed)
    columns: list[tuple[str, Mapping[str, float], str]] = [
        ("learner rank", {**rank, "free": device - sum(rank.values())}, "")
    ]
    columns.append(_engine("engine of the student", student, config.cluster.engine_args, assumed))
    for group, engines in zip(groups(config, work), plan.teachers, strict=True):
        for pool in group:
            memory = pool_memory(config, work, pool, engines.devices, assumed)
            columns.append(_engine(f"engine of {', '.join(pool.names)}", memory, pool.engine_args, assumed))
    names = dict.fromkeys(name for _, parts, _ in columns for name, size in parts.items() if size)
    last = [name for name in ("reserve", "KV cache", "free") if name in names]
    rows: list[Sequence[object]] = [
        [f"memory of a device, GiB of {assumed.device.memory_gib:g}", *(c[0] for c in columns)]
    ]
    rows += [
        [name, *(f"{parts[name] / GIB:.1f}" if name in parts else "" for _, parts, _ in columns)]
        for name in [*(n for n in names if n not in last), *last]
    ]
    rows.append([f"sequences of {work.length} tokens that fit", *(fits for _, _, fits in columns)])
    running = student_running(config, work, plan.student.devices, assumed)
    return f"{_table(rows)}\n  an engine of the student runs at most {running} at once"


def _engine(
    name: str, memory: EngineMemory, args: Sequence[str], assumed: Assumptions
) -> tuple[str, Mapping[str, float], str]:
    """Its column: what it does not take of its device is free."""
    free = assumed.device.memory_gib * GIB - engine_room(args, assumed)
    return name, {**memory.parts, "free": free}, str(memory.sequences)


def _times(config: Config, work: Work, plan: Plan, own: Plan | str) -> str:
    plus = " + unknown" if work.unknown else ""
    rows = [
        ("phase", "seconds"),
        ("sample", _s(plan.sample)),
        ("score", _s(plan.score) + plus if plan.score else plus.removeprefix(" + ")),
        ("update", _s(plan.update)),
        ("weights to engines", _s(plan.transfer)),
        ("step, one after the other", _s(plan.step) + plus),
    ]
    if plan.overlapped is not None:
        ahead = config.cluster.max_staleness
        rows.append((f"step, later ones sampled meanwhile (max_staleness = {ahead})", _s(plan.overlapped) + plus))
    said = _table(rows)
    if plan.nearly < plan.used:
        said += f"\n  {plan.nearly} GPUs would take at most 5 % longer"
    if isinstance(own, Plan):
        said += f"\n  the recipe's own placement takes {own.used} GPUs and {_s(own.period)} s a step{plus}"
    else:
        said += f"\n  the recipe's own placement has no time here: {own}"
    return said


def _settings(config: Config, work: Work, plan: Plan) -> str:
    """The tables of a recipe that ask for this placement."""
    lines = [
        "[cluster]",
        f"learner_ranks = {plan.ranks}",
        "gpus_per_rank = 1",
        f"engines = {plan.student.count}",
        f"gpus_per_engine = {plan.student.devices}",
    ]
    for group, engines in zip(groups(config, work), plan.teachers, strict=True):
        for name in (name for pool in group for name in pool.names):
            key = name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)
            lines += [f"[teachers.{key}]", f"engines = {engines.count}", f"gpus_per_engine = {engines.devices}"]
    return "settings (into the recipe's own tables)\n" + "\n".join(f"  {line}" for line in lines)


def _compared(plans: Sequence[Plan]) -> str:
    """What more GPUs bring, beside the fewest."""
    first = plans[0]
    rows: list[Sequence[object]] = [("GPUs", "used", "step, s", "times faster", "seconds of used GPUs a step")]
    for plan in plans:
        faster = f"{first.period / plan.period:.2f}"
        rows.append((plan.gpus, plan.used, _s(plan.period), faster, _s(plan.period * plan.used)))
    return "== compared, estimated ==\n\n" + _table(rows)


def _s(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they must be, words to the left, numbers to the right."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in text
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)
