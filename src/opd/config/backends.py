"""What a recipe may ask of its mode, and of teachers behind servers."""

from typing import TYPE_CHECKING

from opd.config.cluster import ClusterConfig
from opd.config.teachers import RemoteConfig

if TYPE_CHECKING:
    from opd.config.tree import Config


def require_backend_fits(config: "Config") -> None:
    """Raise ValueError for what one process, or a cluster, cannot do."""
    if config.backend == "local":
        if config.cluster != ClusterConfig():
            raise ValueError("[cluster] is for backend = 'ray', got backend = 'local'; drop it, or set the mode")
        for name, teacher in config.teachers.items():
            if teacher.engines is not None:
                raise ValueError(
                    f"teachers.{name}.engines are started by backend = 'ray', got backend = 'local'; drop it, or give the url "
                    "of a server"
                )
        return
    if config.warmup.steps:
        raise ValueError(
            f"warmup.steps = {config.warmup.steps} needs backend = 'local'; warm up there, then set lora.start"
        )
    cluster = config.cluster
    if cluster.gpus_per_rank > 1:
        raise ValueError(
            f"cluster.gpus_per_rank = {cluster.gpus_per_rank}: a rank computes on one GPU; set more learner_ranks instead"
        )
    if config.compute.device == "cuda" and not cluster.gpus_per_rank:
        raise ValueError("compute.device = 'cuda' and cluster.gpus_per_rank = 0: ranks would have none; write 1")
    _require_engines_fit(config)


def _require_engines_fit(config: "Config") -> None:
    """Teachers of one model share its engines, and sleeping ones share their devices."""
    started = {name: teacher for name, teacher in config.teachers.items() if teacher.engines is not None}
    first: dict[str, str] = {}
    for name, teacher in started.items():
        other = started[first.setdefault(teacher.source or "", name)]
        if (other.engines, other.gpus_per_engine, other.engine_args) != (
            teacher.engines,
            teacher.gpus_per_engine,
            teacher.engine_args,
        ):
            raise ValueError(
                f"teachers.{name} and teachers.{first[teacher.source or '']} are one model, '{teacher.source}', with different "
                "engines; give both the same"
            )
    if not config.cluster.teachers_sleep:
        return
    if len(first) < 2:
        raise ValueError(
            f"cluster.teachers_sleep lets models take turns on their devices, and teachers.NAME.engines start {len(first)}; drop it"
        )
    awake = [name for name, teacher in started.items() if not teacher.gpus_per_engine]
    if awake:
        raise ValueError(
            f"cluster.teachers_sleep frees GPUs (vLLM sleeps on no CPU), and teachers.{awake[0]}.gpus_per_engine = 0; drop it"
        )
    sizes = {(teacher.engines, teacher.gpus_per_engine) for teacher in started.values()}
    if len(sizes) > 1:
        said = ", ".join(f"{n}: {t.engines} with {t.gpus_per_engine} GPUs" for n, t in started.items())
        raise ValueError(f"cluster.teachers_sleep: models that share devices need the same engines, got {said}")


def require_remote_fit(config: "Config") -> None:
    """Raise ValueError for what servers cannot give: they know log-probabilities of a few tokens, at temperature 1."""
    remote = [name for name, teacher in config.teachers.items() if teacher.remote]
    if not remote and config.backend == "local" and config.remote != RemoteConfig():
        raise ValueError("[remote] is for teachers with a url, and this recipe has none; drop it")
    for name in remote:
        field = "url" if config.teachers[name].url is not None else "engines"
        who = f"teachers.{name}.{field}: a server gives log-probabilities of sampled tokens and of its likeliest"
        if config.objective.type == "top_k":
            inside = [n for n, t in config.teachers.items() if not t.remote]
            if inside:
                raise ValueError(
                    f"{who}, and teacher '{inside[0]}' is in process: with type = 'top_k' serve all teachers, or none"
                )
            if config.objective.tail_residual:
                raise ValueError(f"{who}, and objective.tail_residual needs whole distributions; drop it")
        elif config.objective.needs_distributions:
            raise ValueError(
                f"{who}, and objective.type = '{config.objective.type}', baseline = '{config.objective.baseline}' needs whole "
                "distributions; write type = 'top_k', or 'immediate' or 'to_go' with baseline = 'none' or "
                "'leave_one_out', or load the teacher in process (model)"
            )
        if config.temperature != 1.0:
            raise ValueError(f"{who} at temperature 1, got temperature = {config.temperature:g}; leave it at 1")
        if config.objective.extrapolation != 1.0:
            raise ValueError(f"{who}, and objective.extrapolation needs the teacher in process (model); leave it at 1")
        for mixture, teacher in config.teachers.items():
            if name in (teacher.weights or ()):
                raise ValueError(
                    f"{who}, and teachers.{mixture}.weights mixes teachers in process (model); take it out"
                )
        if config.warmup.steps:
            raise ValueError(
                f"{who}, and warmup.steps = {config.warmup.steps} learns from teachers in process; leave it at 0"
            )
