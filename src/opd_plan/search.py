"""The placement with the shortest modelled step among all that fit, for a number of GPUs."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from opd.config import Config, TeacherConfig
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
from opd_plan.roofline import driver_s, inside_s, pool_s, sample_s, transfer_s, update_s, wake_s
from opd_plan.shapes import Shape
from opd_plan.work import Pool, Work

_NEARLY = 1.05


class DoesNotFit(ConfigError):
    """A part that fits on no number of the GPUs given, or all parts together that do not."""


@dataclass(frozen=True)
class Engines:
    """So many engines, each split over so many devices, and the seconds that their phase takes."""

    count: int
    devices: int
    seconds: float

    @property
    def gpus(self) -> int:
        return self.count * self.devices


@dataclass(frozen=True)
class Plan:
    """A placement on `gpus` devices and the seconds of each phase. teachers: of each group of models that shares devices.

    score: of all teachers whose time is known; overlapped: seconds a step where later ones are sampled and scored meanwhile;
    nearly: with how many GPUs a step takes at most a twentieth longer.
    """

    gpus: int
    ranks: int
    student: Engines
    teachers: tuple[Engines, ...]
    score: float
    update: float
    transfer: float
    overlapped: float | None
    nearly: int = 0

    @property
    def period(self) -> float:
        """Seconds from step to step, as the recipe runs them."""
        return self.step if self.overlapped is None else self.overlapped

    @property
    def key(self) -> tuple[float, int, float]:
        """What is to be least: time, then GPUs, then the time of a step by itself."""
        return self.period, self.used, self.step

    @property
    def sample(self) -> float:
        return self.student.seconds

    @property
    def step(self) -> float:
        """One phase after the other."""
        return self.sample + self.score + self.update + self.transfer

    @property
    def used(self) -> int:
        return self.ranks + self.student.gpus + sum(t.gpus for t in self.teachers)

    @property
    def idle(self) -> int:
        return self.gpus - self.used


def groups(config: Config, work: Work) -> list[tuple[Pool, ...]]:
    """The models that share devices: each has its own, but where teachers sleep all take turns."""
    if config.cluster.teachers_sleep:
        return [work.pools]
    return [(pool,) for pool in work.pools]


def best_plan(config: Config, work: Work, gpus: int, assumed: Assumptions) -> Plan:
    """The fastest placement on at most so many GPUs, of equally fast ones that with the fewest.

    Raises DoesNotFit with what is too large, by how much, and what to do.
    """
    ranks = _ranks(config, work, gpus, assumed)
    students = _students(config, work, gpus, assumed)
    teachers = _together([_group(config, work, g, gpus, assumed) for g in groups(config, work)], gpus)
    _require_room(config, work, gpus, ranks, students, teachers)
    counts, driver = [_gpus(found) for found in teachers], driver_s(config, work, assumed)
    faster = [-_slowest(found) for found in teachers]  # from the slowest to the fastest
    found: dict[int, Plan] = {}  # the fastest by how many GPUs they use
    for n in ranks:
        inside, update = inside_s(config, work, n, assumed), update_s(config, work, n, assumed)
        floor = max(driver, inside)
        for student in students:
            room = bisect_right(counts, gpus - n - student.gpus) - 1
            if room < 0:
                continue
            transfer = transfer_s(config, work, student.count, student.devices, n, assumed)
            # teachers that are no slower than what waits for them anyway need no more devices
            spare = inside + update + transfer - student.seconds if config.cluster.max_staleness else 0.0
            waited = max(floor, spare)
            chosen = teachers[min(room, bisect_left(faster, -waited))]
            score = max(floor, _slowest(chosen))
            plan = Plan(
                gpus,
                n,
                student,
                chosen,
                score,
                update,
                transfer,
                _overlapped(config, student, score, inside + update + transfer),
            )
            if plan.used not in found or plan.key < found[plan.used].key:
                found[plan.used] = plan
    fastest = min(found.values(), key=lambda plan: plan.key)
    enough = min(used for used, plan in found.items() if plan.period <= _NEARLY * fastest.period)
    return replace(fastest, nearly=enough)


def own_plan(config: Config, work: Work, assumed: Assumptions) -> Plan | str:
    """The recipe's own placement, or in words why it has no time: it does not say how many GPUs, or a part does not fit."""
    c = config.cluster
    chosen = [config.teachers[group[0].names[0]] for group in groups(config, work)]
    if unfit := _unfit(config, work, chosen, assumed):
        return unfit
    teachers = []
    for group, teacher in zip(groups(config, work), chosen, strict=True):
        count, devices = teacher.engines or 1, teacher.gpus_per_engine
        teachers.append(Engines(count, devices, _group_s(config, work, group, count, devices, assumed)))
    running = student_running(config, work, c.gpus_per_engine, assumed)
    seconds = sample_s(config, work, c.engines, c.gpus_per_engine, running, assumed)
    student = Engines(c.engines, c.gpus_per_engine, seconds)
    inside, update = (f(config, work, c.learner_ranks, assumed) for f in (inside_s, update_s))
    score = max(driver_s(config, work, assumed), inside, _slowest(teachers))
    transfer = transfer_s(config, work, c.engines, c.gpus_per_engine, c.learner_ranks, assumed)
    overlapped = _overlapped(config, student, score, inside + update + transfer)
    plan = Plan(0, c.learner_ranks, student, tuple(teachers), score, update, transfer, overlapped)
    return replace(plan, gpus=plan.used, nearly=plan.used)


def _unfit(config: Config, work: Work, chosen: Sequence[TeacherConfig], assumed: Assumptions) -> str:
    """What keeps the recipe's own placement from having a time, "" if nothing does."""
    c = config.cluster
    missing = [name for name in ("gpus_per_rank", "gpus_per_engine") if not getattr(c, name)]
    found = [f"cluster.{name} is 0" for name in missing]
    found += [
        f"gpus_per_engine of '{group[0].names[0]}' is 0"
        for group, teacher in zip(groups(config, work), chosen, strict=True)
        if not teacher.gpus_per_engine
    ]
    if found:
        return f"{' and '.join(found)}, so it asks for no GPU"
    split = {"cluster.gpus_per_engine": c.gpus_per_engine}
    split |= {
        f"gpus_per_engine of '{group[0].names[0]}'": teacher.gpus_per_engine
        for group, teacher in zip(groups(config, work), chosen, strict=True)
    }
    for name, devices in split.items():
        if devices > assumed.gpus_per_node:
            return f"{name} is {devices}, and an engine lives on one node of {assumed.gpus_per_node}"
    if not _rank_fits(config, work, c.learner_ranks, assumed):
        return f"{c.learner_ranks} learner ranks have too little memory"
    student = work.student.splits(c.gpus_per_engine) and student_running(config, work, c.gpus_per_engine, assumed)
    if not student:
        return f"an engine of the student does not fit {c.gpus_per_engine} GPUs, or cannot be split over them"
    for group, teacher in zip(groups(config, work), chosen, strict=True):
        if not _group_fits(config, work, group, teacher.gpus_per_engine, assumed):
            return f"an engine of {_named(group)} does not fit {teacher.gpus_per_engine} GPUs, or cannot be split over them"
    return ""


def _overlapped(config: Config, student: Engines, score: float, learner: float) -> float | None:
    """Sampling and scoring of later steps beside what the learner does, where the recipe lets them run ahead."""
    return max(student.seconds + score, learner) if config.cluster.max_staleness else None


def sizes(most: int, assumed: Assumptions) -> list[int]:
    """Over how many devices an engine may be split: powers of two within a node, which leave no gaps between engines."""
    return [n for n in (1, 2, 4, 8, 16, 32) if n <= min(most, assumed.gpus_per_node)]


def numbers_of_ranks(most: int, assumed: Assumptions) -> list[int]:
    """Powers of two within a node, then whole nodes."""
    node = assumed.gpus_per_node
    return [*sizes(most, assumed), *range(2 * node, most + 1, node)]


def _ranks(config: Config, work: Work, gpus: int, assumed: Assumptions) -> list[int]:
    """The numbers of ranks whose memory suffices."""
    room = assumed.device.memory_gib * GIB
    every = numbers_of_ranks(min(gpus, work.rollouts), assumed)
    fits = [n for n in every if _rank_fits(config, work, n, assumed)]
    if fits:
        return fits
    over = {n: sum(rank_memory(config, work, n, assumed).values()) - room for n in every}
    least = min(every, key=lambda n: over[n])
    parts = rank_memory(config, work, least, assumed)
    name, size = max(parts.items(), key=lambda part: part[1])
    todo = [] if config.compute.activation_checkpointing else ["compute.activation_checkpointing = true"]
    todo += ["a smaller compute.max_tokens"] if config.compute.max_tokens > work.length else ["shorter responses"]
    todo += ["engines for the teachers in process (teachers.NAME.engines)"] if work.frozen else []
    more = next(
        (n for n in numbers_of_ranks(work.rollouts, assumed) if n > gpus and _rank_fits(config, work, n, assumed)), 0
    )
    todo += [f"more GPUs ({more} ranks fit)"] if more else []
    raise DoesNotFit(
        f"{gpus} GPUs: one of {least} learner ranks needs {(room + over[least]) / GIB:.1f} GiB of the {room / GIB:.1f} of each "
        f"{assumed.device.name}, {over[least] / GIB:.1f} too few; most of it is '{name}' with {size / GIB:.1f}; try {_either(todo)}"
    )


def _rank_fits(config: Config, work: Work, ranks: int, assumed: Assumptions) -> bool:
    return sum(rank_memory(config, work, ranks, assumed).values()) <= assumed.device.memory_gib * GIB


def _students(config: Config, work: Work, gpus: int, assumed: Assumptions) -> list[Engines]:
    """Every number and size of engines that sample."""
    found = []
    for devices in sizes(gpus, assumed):
        if not work.student.splits(devices) or not (running := student_running(config, work, devices, assumed)):
            continue
        found += [
            Engines(count, devices, sample_s(config, work, count, devices, running, assumed))
            for count in range(1, min(gpus // devices, work.rollouts) + 1)
        ]
    if not found:
        splits = [n for n in sizes(gpus, assumed) if work.student.splits(n)]
        memory = student_memory(config, work, max(splits), assumed)
        raise _no_engine(gpus, work, work.student, max(splits), memory, config.cluster.engine_args, assumed)
    return found


def _group(config: Config, work: Work, group: Sequence[Pool], gpus: int, assumed: Assumptions) -> list[Engines]:
    """Every number and size of engines of models that share devices: of one, or of several that take turns."""
    found = []
    allowed = sizes(gpus, assumed)
    for pool in group:
        splits = [n for n in sizes(gpus, assumed) if pool.shape.splits(n)]
        memory = {n: pool_memory(config, work, pool, n, assumed) for n in splits}
        fits = [n for n in splits if memory[n].sequences > 0]
        if not fits:
            n = max(splits)
            raise _no_engine(gpus, work, pool.shape, n, memory[n], pool.engine_args, assumed)
        if not set(allowed) & set(fits):
            raise DoesNotFit(
                f"{gpus} GPUs: cluster.teachers_sleep lets teachers share devices, and no engine's size fits all of them: "
                f"'{pool.shape.source}' fits {', '.join(map(str, fits))} GPUs, those before it {', '.join(map(str, allowed))}; "
                "drop it"
            )
        allowed = [n for n in allowed if n in fits]
    for devices in allowed:
        found += [
            Engines(count, devices, _group_s(config, work, group, count, devices, assumed))
            for count in range(1, min(gpus // devices, work.rollouts) + 1)
        ]
    return _frontier(found)


def _group_fits(config: Config, work: Work, group: Sequence[Pool], devices: int, assumed: Assumptions) -> bool:
    memory = [pool_memory(config, work, pool, devices, assumed) for pool in group]
    return all(pool.shape.splits(devices) and m.sequences > 0 for pool, m in zip(group, memory, strict=True))


def _group_s(
    config: Config, work: Work, group: Sequence[Pool], count: int, devices: int, assumed: Assumptions
) -> float:
    """Scoring by models that share devices, one after the other; those that sleep meanwhile have to be woken."""
    each = bytes_of(config).remote
    wake = sum(wake_s(pool.shape, devices, each, assumed) for pool in group) if len(group) > 1 else 0.0
    return wake + sum(pool_s(config, work, pool, count, devices, assumed) for pool in group)


def _no_engine(
    gpus: int, work: Work, shape: Shape, devices: int, memory: EngineMemory, args: Sequence[str], assumed: Assumptions
) -> DoesNotFit:
    """Why the largest engine that may be is too small."""
    parts = {name: size / GIB for name, size in memory.parts.items()}
    left, one = parts.pop("KV cache"), memory.sequence / GIB
    said = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
    todo = ["a smaller --max-num-batched-tokens in its engine_args"] if parts["logits"] > parts["weights"] else []
    todo += ["more GPUs"] if 2 * devices <= assumed.gpus_per_node and shape.splits(2 * devices) else []
    todo += ["a --gpu with more memory", "shorter sequences"]
    return DoesNotFit(
        f"{gpus} GPUs: an engine of '{shape.source}' over {devices} of them may take {engine_room(args, assumed) / GIB:.1f} GiB of "
        f"each {assumed.device.name}, and needs {sum(parts.values()) + one:.1f} ({said}, one sequence of {work.length} tokens "
        f"{one:.1f}), {one - left:.1f} too few; try {_either(todo)}"
    )


def _frontier(options: Iterable[Engines]) -> list[Engines]:
    """Those that are faster than all with as few GPUs, from few to many."""
    found: list[Engines] = []
    for option in sorted(options, key=lambda o: (o.gpus, o.seconds)):
        if not found or option.seconds < found[-1].seconds:
            found.append(option)
    return found


def _gpus(found: Sequence[Engines]) -> int:
    return sum(engines.gpus for engines in found)


def _slowest(found: Sequence[Engines]) -> float:
    return max((engines.seconds for engines in found), default=0.0)


def _together(every: Sequence[Sequence[Engines]], gpus: int) -> list[tuple[Engines, ...]]:
    """Groups of models score side by side: of all choices those that are faster than all with as few GPUs, from few to many."""
    found: list[tuple[Engines, ...]] = [()]
    for options in every:
        joined = sorted(((*a, b) for a, b in product(found, options)), key=lambda f: (_gpus(f), _slowest(f)))
        found = []
        for one in joined:
            if not found or (_gpus(one) <= gpus and _slowest(one) < _slowest(found[-1])):
                found.append(one)
    return found


def _require_room(
    config: Config,
    work: Work,
    gpus: int,
    ranks: Sequence[int],
    students: Sequence[Engines],
    teachers: Sequence[tuple[Engines, ...]],
) -> None:
    """Raise DoesNotFit where each part fits by itself and all together do not."""
    student = min(engines.gpus for engines in students)
    least = min(ranks) + student + _gpus(teachers[0])
    if least <= gpus:
        return
    parts = [f"{min(ranks)} for the learner", f"{student} for an engine of the student"]
    for group, engines in zip(groups(config, work), teachers[0], strict=True):
        parts.append(f"{engines.gpus} for {_named(group)}")
    todo = [f"--gpus {least}"]
    todo += ["cluster.teachers_sleep = true"] if len(work.pools) > 1 and not config.cluster.teachers_sleep else []
    todo += ["a --gpu with more memory", *(["a teacher behind a url of its own"] if work.pools else [])]
    raise DoesNotFit(
        f"{gpus} GPUs: at least {least} are needed ({', '.join(parts)}), {least - gpus} more; try {_either(todo)}"
    )


def _named(group: Sequence[Pool]) -> str:
    names = " and ".join(f"'{pool.shape.source}'" for pool in group)
    return f"{names}, which take turns" if len(group) > 1 else names


def _either(todo: Sequence[str]) -> str:
    """The choices in words."""
    return f"{', '.join(todo[:-1])} or {todo[-1]}" if len(todo) > 1 else todo[0]
