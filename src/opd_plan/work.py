"""What a step of a recipe asks for: whose models, how many rollouts each scores, how many tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

from opd.config import Config
from opd.errors import ConfigError
from opd_plan.shapes import Shape, adapter_of, adapter_parameters, read_shape

# as vLLM reads them
_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Pool:
    """A model that teachers ask engines for: its sizes, the teachers that share it, the rollouts a step that it scores, and the
    arguments that the recipe gives its engines."""

    shape: Shape
    names: tuple[str, ...]
    rollouts: float
    engine_args: tuple[str, ...]


@dataclass(frozen=True)
class Policy:
    """A teacher in process: sizes of the model that speaks, and the rollouts a step that it scores."""

    name: str
    shape: Shape
    rollouts: float


@dataclass(frozen=True)
class Work:
    """A step: rollouts in groups that share a prompt, and who scores them.

    response: the most tokens that a rollout's student writes, over all its turns; in_flight: rollouts that are sampled at once.
    trainable: parameters with a gradient. frozen: models that lie on the ranks beside the student, once each; adapters: parameters
    of teachers' adapters there. unknown: teachers at servers of their own, of whose speed nothing is known.
    """

    student: Shape
    rollouts: int
    group: int
    prompt: int
    response: int
    turns: int
    in_flight: int
    trainable: int
    pools: tuple[Pool, ...]
    policies: tuple[Policy, ...]
    frozen: tuple[Shape, ...]
    adapters: int
    unknown: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of one rollout, its prompt among them."""
        return self.prompt + self.response


def work_of(config: Config, *, prompt_tokens: int) -> Work:
    """What a recipe asks of each step. Raises ConfigError and ModelError for what cannot be planned."""
    if config.backend != "ray":
        raise ConfigError(
            f"a plan places the parts of backend = 'ray', got backend = '{config.backend}'; add backend=ray"
        )
    shapes: dict[str, Shape] = {}

    def shape(source: str) -> Shape:
        if source not in shapes:
            shapes[source] = read_shape(source)
        return shapes[source]

    student, sampling = shape(config.student), config.sampling
    turns = config.episodes.max_turns if any(t.has_environment for t in config.tasks.values()) else 1
    response = min(turns * sampling.max_new_tokens, (student.context or 10**12) - prompt_tokens)
    if response < 1:
        raise ConfigError(
            f"prompts of {prompt_tokens} tokens leave nothing of the context of '{config.student}' ({student.context}); lower "
            "--prompt-tokens"
        )
    rollouts = sampling.prompts_per_step * sampling.group_size
    lora = config.trainable == "lora"
    trainable = student.parameters
    if lora:
        rank, targets = config.lora.rank, config.lora.target_modules
        trainable = adapter_parameters(config.student, rank=rank, target_modules=targets)
    asked = _asked(config, rollouts)
    inside = {name: n for name, n in asked.items() if not _remote(config, name)}
    policies = tuple(Policy(name, shape(_source(config, name)), n) for name, n in inside.items())
    adapters = [config.teachers[name].adapter for name in inside if name in config.teachers]
    own = {config.student} if lora else set()
    return Work(
        student=student,
        rollouts=rollouts,
        group=sampling.group_size,
        prompt=prompt_tokens,
        response=response,
        turns=turns,
        in_flight=_in_flight(config, rollouts),
        trainable=trainable,
        pools=_pools(config, asked, shape),
        policies=policies,
        frozen=tuple(shape(s) for s in dict.fromkeys(v.shape.source for v in policies) if s not in own),
        adapters=sum(adapter_of(folder, config.student) for folder in adapters if folder is not None),
        unknown=tuple(name for name, t in config.teachers.items() if t.url is not None),
    )


def _source(config: Config, name: str) -> str:
    """The model that speaks for a teacher in process; adapters and the initial student speak through the student's own."""
    teacher = config.teachers.get(name)
    return (teacher.model if teacher is not None else None) or config.student


def _remote(config: Config, name: str) -> bool:
    return name in config.teachers and config.teachers[name].remote


def _asked(config: Config, rollouts: int) -> dict[str, float]:
    """How many rollouts a step each single teacher scores on average: tasks are drawn by their weights."""
    total = sum(task.weight for task in config.tasks.values())
    found = {name: 0.0 for name, teacher in config.teachers.items() if teacher.weights is None}
    for task in config.tasks.values():
        # records that name their teachers themselves are not read: all are taken to be asked alike
        teachers = [task.teacher] if task.teacher is not None else list(config.teachers)
        for name in teachers:
            for part in config.teachers[name].weights or {name: 1.0}:
                found[part] += rollouts * task.weight / total / len(teachers)
    reference = config.objective.reference
    if reference is not None:
        inside = sum(n for name, n in found.items() if not config.teachers[name].remote)
        found[reference] = max(found.get(reference, 0.0), inside)
    return found


def _pools(config: Config, asked: Mapping[str, float], shape: Callable[[str], Shape]) -> tuple[Pool, ...]:
    """The models that engines are started for, each once."""
    started: dict[str, list[str]] = {}
    for name, teacher in config.teachers.items():
        if teacher.engines is not None and teacher.source is not None:
            started.setdefault(teacher.source, []).append(name)
    return tuple(
        Pool(
            shape(_source(config, names[0])),
            tuple(names),
            sum(asked[n] for n in names),
            tuple(config.teachers[names[0]].engine_args),
        )
        for names in started.values()
    )


def _in_flight(config: Config, rollouts: int) -> int:
    """How many rollouts are sampled at once: where all teachers are served and awake, prompts go one by one (`opd.loop`); games
    are hosted, so many at once."""
    if config.cluster.teachers_sleep or not all(teacher.remote for teacher in config.teachers.values()):
        hosted = any(task.has_environment for task in config.tasks.values())
        return min(rollouts, config.episodes.max_concurrent) if hosted else rollouts
    group = config.sampling.group_size
    return min(rollouts, max(1, config.episodes.max_concurrent // group) * group)


def flag(args: Sequence[str], name: str, default: float) -> float:
    """The number behind an argument of an engine ("--max-num-seqs 64", "--max_num_seqs=64", "8k"), the last where it stands twice,
    or what it is without it."""
    for place in reversed(range(len(args))):
        key, sign, value = args[place].partition("=")
        if key.replace("_", "-") == name:
            text = value if sign else next(iter(args[place + 1 : place + 2]), "")
            factor = _FACTORS.get(text[-1:], 1)
            try:
                number = float(text[:-1] if factor > 1 else text) * factor
            except ValueError:
                raise ConfigError(f"engine_args: {name} {text!r} is no number") from None
            if not 0 < number < inf:
                raise ConfigError(f"engine_args: {name} {text!r}, expected a number above 0")
            return number
    return default


def share(total: float, parts: int) -> int:
    """What the busiest of so many parts gets."""
    return ceil(total / parts - 1e-9)
