"""Rules across the tables of a training recipe. Each raises ValueError with the remedy."""

from typing import TYPE_CHECKING

from opd.config.node import nearest
from opd.config.teachers import ClusterConfig, RemoteConfig

if TYPE_CHECKING:
    from opd.config.tree import Config


def require_consistent(config: "Config") -> None:
    """Raise ValueError for the first rule across tables that the recipe breaks."""
    for rule in (_names_exist, _backend_fits, _remote_fits, _reward_fits, _mask_fits):
        rule(config)


def _names_exist(config: "Config") -> None:
    """Names of teachers stand in [teachers]."""
    known = ", ".join(sorted(config.teachers))
    single = {name for name, teacher in config.teachers.items() if teacher.weights is None}
    for name, task in config.tasks.items():
        if task.teacher is not None and task.teacher not in config.teachers:
            hint = nearest(task.teacher, config.teachers)
            raise ValueError(f"tasks.{name}.teacher = '{task.teacher}' is no teacher of [teachers] ({known}){hint}")
    for name, teacher in config.teachers.items():
        for part in teacher.weights or ():
            if part not in single:
                hint = nearest(part, config.teachers)
                raise ValueError(
                    f"teachers.{name}.weights: '{part}' is no single teacher of [teachers] ({known}){hint}"
                )
    reference = config.objective.reference
    if reference == "student" and "student" in config.teachers:
        raise ValueError(
            "objective.reference = 'student' means the initial student; give the teacher of that name another name"
        )
    if reference not in (None, "student", *single):
        raise ValueError(
            f"objective.reference = '{reference}' is neither 'student' nor a single teacher of [teachers] ({known})"
        )


def _backend_fits(config: "Config") -> None:
    """The local backend has no cluster, and the Ray backend has its own limits."""
    if config.backend == "local":
        if config.cluster != ClusterConfig():
            raise ValueError(
                "[cluster] works only with backend = 'ray', got backend = 'local'; remove [cluster], or write backend = 'ray'"
            )
        for name, teacher in config.teachers.items():
            if teacher.engines is not None:
                raise ValueError(
                    f"teachers.{name}.engines works only with backend = 'ray', got backend = 'local'; remove engines, or set "
                    f"teachers.{name}.url to a server"
                )
        return
    if config.warmup.steps:
        raise ValueError(
            f"warmup.steps = {config.warmup.steps} needs backend = 'local'; warm up there, then set lora.start"
        )
    quantized = {"compute.quantization": config.compute.quantization}
    quantized |= {f"teachers.{name}.quantization": t.quantization for name, t in config.teachers.items()}
    for key, value in quantized.items():
        if value is not None:
            raise ValueError(
                f"{key} = '{value}' works only with backend = 'local': ranks cannot share weights of a few bits; remove the key"
            )
    cluster = config.cluster
    if cluster.gpus_per_rank > 1:
        raise ValueError(
            f"cluster.gpus_per_rank = {cluster.gpus_per_rank}: a rank computes on one GPU; set more learner_ranks instead"
        )
    if config.compute.device == "cuda" and not cluster.gpus_per_rank:
        raise ValueError("compute.device = 'cuda' and cluster.gpus_per_rank = 0: ranks would have none; write 1")
    _engines_fit(config)


def _engines_fit(config: "Config") -> None:
    """Teachers of one model share its engines, and sleeping ones share their devices."""
    started = {name: teacher for name, teacher in config.teachers.items() if teacher.engines is not None}
    first: dict[str, str] = {}
    for name, teacher in started.items():
        other = first.setdefault(teacher.source or "", name)
        if any(
            getattr(started[other], k) != getattr(teacher, k) for k in ("engines", "gpus_per_engine", "engine_args")
        ):
            raise ValueError(
                f"teachers.{name} and teachers.{other} are one model, '{teacher.source}', with different engines; give both the "
                "same engines"
            )
    if not config.cluster.teachers_sleep:
        return
    if len(first) < 2:
        raise ValueError(
            "cluster.teachers_sleep lets several models take turns on the same devices, and teachers.NAME.engines start "
            f"{len(first)} of them; remove cluster.teachers_sleep"
        )
    awake = [name for name, teacher in started.items() if not teacher.gpus_per_engine]
    if awake:
        raise ValueError(
            f"cluster.teachers_sleep works only on GPUs, and teachers.{awake[0]}.gpus_per_engine = 0; remove cluster.teachers_sleep"
        )
    if len({(teacher.engines, teacher.gpus_per_engine) for teacher in started.values()}) > 1:
        said = ", ".join(f"{n}: {t.engines} with {t.gpus_per_engine} GPUs" for n, t in started.items())
        raise ValueError(f"cluster.teachers_sleep: models that share devices need the same engines, got {said}")


def _remote_fits(config: "Config") -> None:
    """A server gives log-probabilities of a few tokens, at temperature 1; no whole distribution."""
    remote = [name for name, teacher in config.teachers.items() if teacher.remote]
    inside = [name for name in config.teachers if name not in remote]
    if not remote and config.backend == "local" and config.remote != RemoteConfig():
        raise ValueError("[remote] has no effect, because no teacher has a url; remove [remote]")
    objective = config.objective
    for name in remote:
        key = "url" if config.teachers[name].url is not None else "engines"
        who = f"teachers.{name}.{key}: a server returns log-probabilities of the sampled token and of the top-k tokens only"
        if objective.type == "top_k":
            if inside:
                raise ValueError(
                    f"{who}, and teacher '{inside[0]}' is loaded in this process; with objective.type = 'top_k' put all teachers "
                    "on servers, or none"
                )
            if objective.tail_residual:
                raise ValueError(
                    f"{who}, and objective.tail_residual needs whole distributions; remove objective.tail_residual"
                )
        elif objective.needs_distributions:
            raise ValueError(
                f"{who}, and objective.type = '{objective.type}', baseline = '{objective.baseline}' needs whole distributions; "
                "write type = 'top_k', or 'immediate' or 'to_go' with baseline = 'none' or 'leave_one_out', or load the teacher "
                "in this process (model)"
            )
        if config.temperature != 1.0:
            raise ValueError(
                f"{who}, and at temperature 1 only; got temperature = {config.temperature:g}, set temperature = 1"
            )
        if objective.extrapolation != 1.0:
            raise ValueError(
                f"{who}, and objective.extrapolation needs the teacher in this process (model); set it to 1"
            )
        for mixture, teacher in config.teachers.items():
            if name in (teacher.weights or ()):
                raise ValueError(
                    f"{who}, and teachers.{mixture}.weights mixes teachers in this process (model); remove '{name}' there"
                )
        if config.warmup.steps:
            raise ValueError(
                f"{who}, and warmup.steps = {config.warmup.steps} needs teachers in this process (model); set it to 0"
            )


def _reward_fits(config: "Config") -> None:
    """Baselines across samples need a group, and weights and clips of sampled advantages need a sampled advantage."""
    objective, reward, groups = config.objective, config.reward, config.sampling.group_size
    if reward.coef > 0 and reward.baseline != "none" and groups < 2:
        raise ValueError(
            f"reward.baseline = '{reward.baseline}' compares the samples of one prompt: set "
            "sampling.group_size >= 2, or reward.baseline = 'none'"
        )
    if objective.baseline == "leave_one_out" and groups < 2:
        raise ValueError(
            f"objective.baseline = '{objective.baseline}' compares the samples of one prompt: set sampling.group_size >= 2"
        )
    sampled = reward.coef > 0 or objective.type not in ("exact", "top_k")
    if objective.correction.type == "truncate" and not sampled:
        raise ValueError(
            f"objective.correction.type = 'truncate' has no effect: it reweights sampled advantages, and objective.type = "
            f"'{objective.type}' without a reward has none; remove objective.correction"
        )
    if objective.loss == "ppo" and not sampled:
        raise ValueError(
            f"loss = 'ppo' clips sampled advantages; type = '{objective.type}' without a reward has none: write loss = 'reinforce'"
        )


def _mask_fits(config: "Config") -> None:
    """A mask of format errors neither masks nothing nor pays for errors, and something is left to learn from."""
    objective, reward, masked = config.objective, config.reward, config.mask.format_errors != "off"
    mask = f"mask.format_errors = '{config.mask.format_errors}'"
    if masked and not any(task.checks.rules for task in config.tasks.values()):
        raise ValueError(
            f'{mask} masks nothing: no task has checks; name rules in tasks.NAME.checks.rules, such as ["truncated"]'
        )
    masked = masked and objective.coef > 0
    if masked and not objective.centred and reward.coef == 0:
        raise ValueError(
            f"{mask} with type = '{objective.type}' and a sampled term without a baseline rewards errors: unmasked tokens "
            "have a mean advantage of -KL < 0, masked tokens have 0 (opd theory: errors rise from 2 % to 24 %); set "
            "objective.baseline = 'leave_one_out' (or 'kl' with type = 'immediate'), or type = 'exact' without "
            "tail_residual, or reward.coef > 0"
        )
    if masked and not objective.exactly_centred and reward.coef > 0 and reward.format_error == 0:
        raise ValueError(
            f"{mask} with reward.format_error = 0 pays for errors: a masked response saves more KL than it loses reward (opd "
            "theory, claim H-e: errors rise from the teacher's 3 % to 48 %); set reward.format_error = -1, or "
            "objective.type = 'exact'"
        )
    if objective.coef == 0 and reward.coef == 0:
        raise ValueError("objective.coef = 0 and reward.coef = 0 leave nothing to learn from; set one of them")
