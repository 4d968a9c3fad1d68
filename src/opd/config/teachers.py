"""[teachers], [remote] and [cluster]: where models come from, how servers are asked, and where a distributed run goes."""

from typing import Annotated, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from opd.config.node import Node, NonNegative, Positive

ServerKind: TypeAlias = Literal["vllm", "sglang"]
"""The kinds of servers; each has a case in `opd.remote.teacher.protocol_of`."""


class TeacherConfig(Node):
    """One teacher: a whole model (hub id, folder or GGUF file), a LoRA adapter of the student's own base, a model behind a
    server, or a mixture of other teachers.

    `url` is the address of a server (http://host:8000), or a list of servers of the same model. `server` is its kind.
    `served_model` is the model's name on the server, required where the server has several. `api_key_env` names the environment
    variable that holds the server's key, if the server requires one.

    `weights` names other teachers of [teachers] and mixes them. The weights are scaled to sum to one, so that a prompt with three
    teachers does not weigh three times. The student then follows their normalised geometric mean.

    `template`: the chat template of the teacher's prompts, its "own" or the "student"'s. An adapter shares the student's, and a
    served model is asked in it.

    `engines`, with `model` or `adapter` and backend = "ray": how many vLLM servers of this teacher the run starts on the cluster,
    each with `gpus_per_engine` GPUs. `engine_args` follow the arguments that opd gives them. For its engines an adapter is merged
    into the student's base. Teachers of one model share its servers.
    """

    sources: ClassVar = ("model", "adapter", "url", "weights")
    """The keys of which a teacher has exactly one."""

    model: str | None = None
    adapter: str | None = None
    url: str | list[str] | None = None
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    server: ServerKind = "vllm"
    served_model: str | None = None
    api_key_env: str | None = None
    template: Literal["own", "student"] = "own"
    engines: Positive | None = None
    gpus_per_engine: NonNegative = 0
    engine_args: list[str] = Field(default_factory=list)

    @property
    def remote(self) -> bool:
        """Whether opd asks it over HTTP, at a server of the user's or at one that the run starts."""
        return self.url is not None or self.engines is not None

    @property
    def source(self) -> str | None:
        """The folder, file or hub id of its weights, if it is known."""
        return self.model or self.adapter

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses without a final slash; empty for a teacher without a url."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return tuple(u.rstrip("/").removesuffix("/v1") for u in given)

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if sum(getattr(self, source) is not None for source in self.sources) != 1:
            raise ValueError(
                "set exactly one of 'model' (hub id, folder, GGUF file), 'adapter' (a LoRA folder), 'url' (of a server) and "
                "'weights' (other teachers)"
            )
        if self.weights is not None and len(self.weights) < 2:
            raise ValueError(f"weights names {len(self.weights)} teachers, expected two or more")
        if self.template != "own" and (self.adapter is not None or self.weights is not None):
            what = (
                "an adapter has the student's template" if self.adapter is not None else "weights names other teachers"
            )
            raise ValueError(f"template = '{self.template}' has no effect: {what}; drop it")
        return self

    @model_validator(mode="after")
    def _started(self) -> "TeacherConfig":
        if self.engines is None:
            for key in ("gpus_per_engine", "engine_args"):
                if not self.is_default(key):
                    raise ValueError(f"{key} belongs to engines; drop it, or say how many engines")
        elif self.source is None:
            raise ValueError(
                f"engines = {self.engines} starts servers of a model; give it in model or adapter, or drop engines"
            )
        elif self.source.endswith(".gguf"):
            raise ValueError(
                f"engines = {self.engines}: they do not read '{self.source}'; give a folder with safetensors, or drop engines"
            )
        return self

    @model_validator(mode="after")
    def _served(self) -> "TeacherConfig":
        if self.url is None:
            for key in ("served_model", "api_key_env", "server"):
                if not self.is_default(key):
                    raise ValueError(f"{key} belongs to url; drop it, or give the server's url")
        elif not self.urls:
            raise ValueError("url = [] names no server")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.username or parts.password or parts.query:
                # not shown: it may hold a secret
                raise ValueError(
                    "url holds credentials or a query; name the environment variable with the key in api_key_env instead"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(url):
                raise ValueError(f"url = '{url}' is no address of a server, such as http://127.0.0.1:8000")
        return self


def _has_port(url: str) -> bool:
    """Whether the url has a valid port, or none."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


class RemoteConfig(Node):
    """Requests to served models. Each is tried `attempts` times, `timeout_s` seconds each. Waits between attempts grow from
    `first_wait_s` to `longest_wait_s` and are drawn at random below that. At most `max_in_flight` requests wait for one server.

    A rollout whose request still fails is set aside with the reason. A step that loses more than `max_lost_fraction` of its
    rollouts in this way ends the run, which can be resumed.
    """

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    attempts: Positive = 5
    first_wait_s: Annotated[float, Field(ge=0)] = 0.5
    longest_wait_s: Annotated[float, Field(ge=0)] = 30.0
    max_in_flight: Positive = 64
    max_lost_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25

    @model_validator(mode="after")
    def _waits_grow(self) -> "RemoteConfig":
        if self.longest_wait_s < self.first_wait_s:
            raise ValueError(
                f"longest_wait_s = {self.longest_wait_s:g} is below first_wait_s = {self.first_wait_s:g}; raise it"
            )
        return self


class ClusterConfig(Node):
    """A run on a Ray cluster. `address` is that of a running cluster ("auto" finds it); without one, Ray starts on this machine.

    Learner: `learner_ranks` processes hold the student's weights, each with `gpus_per_rank` GPUs (0: it computes on CPUs).
    mixed_precision: the learner computes in bfloat16 on weights and gradients in float32.

    Engines: `engines` vLLM servers sample from the student, each with `gpus_per_engine` GPUs. `engine_command` starts one, in any
    environment that has vLLM; `engine_args` follow the arguments that opd gives. An engine must answer within `engine_start_s`
    seconds. The engines of teachers are started with the same command. teachers_sleep: the engines of all teachers share their
    devices, and one model is awake at a time. merge_adapter: engines get the student's adapter merged into their weights, in
    place, instead of beside them.

    Ray places each part where enough GPUs and CPUs are free. A fraction of a CPU, or 0, is a booking, not a limit.

    max_staleness: 0 is on-policy. Above 0, the next steps are sampled and scored during an update, by a student that is at most so
    many updates older.
    """

    address: str | None = None
    learner_ranks: Positive = 1
    gpus_per_rank: NonNegative = 0
    cpus_per_rank: Annotated[float, Field(ge=0)] = 1.0
    engines: Positive = 1
    gpus_per_engine: NonNegative = 0
    cpus_per_engine: Annotated[float, Field(ge=0)] = 1.0
    engine_command: list[str] = Field(default_factory=lambda: ["vllm", "serve"], min_length=1)
    engine_args: list[str] = Field(default_factory=list)
    engine_start_s: Annotated[float, Field(gt=0)] = 900.0
    merge_adapter: bool = False
    teachers_sleep: bool = False
    max_staleness: NonNegative = 0
    mixed_precision: bool = False
