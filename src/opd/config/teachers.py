"""[teachers], [remote] and [cluster]: where models come from, how servers are asked, and where a distributed run goes."""

from typing import Annotated, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from opd.config.node import Node, NonNegative, Positive

Dtype: TypeAlias = Literal["float32", "bfloat16"]
Quantization: TypeAlias = Literal["nf4", "int8"]
TemplateArgs: TypeAlias = dict[str, StrictBool | StrictInt | StrictFloat | StrictStr | list[StrictStr]]
"""Variables of a chat template, by name."""
ServerKind: TypeAlias = Literal["vllm", "sglang"]
"""The kinds of servers; each has a case in `opd.remote.protocols.protocol_of`."""


class TeacherConfig(Node):
    """One teacher. It has exactly one of `model`, `adapter`, `url` and `weights`."""

    sources: ClassVar = ("model", "adapter", "url", "weights")
    """The keys of which a teacher has exactly one."""

    model: str | None = None
    """A whole model: hub id, folder or GGUF file."""
    adapter: str | None = None
    """A folder with a LoRA adapter of the student's own base. All adapters share one copy of the base."""
    url: str | list[str] | None = None
    """The address of a server, such as `http://host:8000`, or of several servers of the same model."""
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """A mixture of other teachers, such as `{ math = 3, code = 1 }`. The weights are scaled to sum to one; the student follows
    the normalised geometric mean of the teachers."""
    server: ServerKind = "vllm"
    """With `url`: the kind of server."""
    served_model: str | None = None
    """With `url`: the name of the model on the server, required where the server lists several."""
    api_key_env: str | None = None
    """With `url`: the environment variable that holds the server's key. No file holds the key itself."""
    template: Literal["own", "student"] = "own"
    """The chat template of the teacher's prompts, where both models share a vocabulary. "own", because the teacher was trained on
    it. An adapter and a served model always have the student's."""
    dtype: Dtype | None = None
    """With `model`: the data type of its weights and passes. By default `compute.dtype`."""
    quantization: Quantization | None = None
    """With `model`: keeps the weights of its linear layers in 4 ("nf4") or 8 bits ("int8"), by bitsandbytes. Install
    `opd[quantized]`. It saves memory, and moves the teacher: `opd check` says by how much."""
    template_args: TemplateArgs | None = None
    """With `model`: variables for the teacher's own chat template. By default those of `chat.template_args`."""
    engines: Positive | None = None
    """With `model` or `adapter` and `backend = "ray"`: the number of vLLM servers of this teacher that the run starts. Teachers of
    one model share its servers."""
    gpus_per_engine: NonNegative = 0
    """The GPUs of each of these servers."""
    engine_args: list[str] = Field(default_factory=list)
    """More arguments for these servers, after those of opd."""

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
        for key in ("template", "template_args"):
            if self.is_default(key):
                continue
            why = None
            if self.weights is not None:
                why = "weights names other teachers"
            elif self.adapter is not None:
                why = "an adapter has the student's template"
            elif key == "template_args" and (self.remote or self.template == "student"):
                why = "this teacher reads the student's prompts"
            if why is not None:
                given = f"template = '{self.template}'" if key == "template" else key
                raise ValueError(f"{given} has no effect: {why}; remove {key}")
        for key in ("dtype", "quantization"):
            if not self.is_default(key) and (self.model is None or self.remote):
                raise ValueError(f"{key} works only with model, in process; remove {key}, or set model")
        return self

    @model_validator(mode="after")
    def _started(self) -> "TeacherConfig":
        if self.engines is None:
            for key in ("gpus_per_engine", "engine_args"):
                if not self.is_default(key):
                    raise ValueError(f"{key} works only with engines; remove {key}, or set engines")
        elif self.source is None:
            raise ValueError(
                f"engines = {self.engines} starts servers of a model; set model or adapter, or remove engines"
            )
        elif self.source.endswith(".gguf"):
            raise ValueError(
                f"engines = {self.engines}: they do not read '{self.source}'; give a folder with safetensors, or remove engines"
            )
        return self

    @model_validator(mode="after")
    def _served(self) -> "TeacherConfig":
        if self.url is None:
            for key in ("served_model", "api_key_env", "server"):
                if not self.is_default(key):
                    raise ValueError(f"{key} works only with url; remove {key}, or set url")
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
    """Requests to servers. opd sets a rollout aside, with the reason, when all attempts of its request fail."""

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """The time limit of one attempt, in seconds. 300, because a large teacher may take minutes to score a full queue."""
    attempts: Positive = 5
    """The maximum number of attempts for one request."""
    first_wait_s: Annotated[float, Field(ge=0)] = 0.5
    """The maximum wait before the second attempt, in seconds. Later maxima grow, and each wait is drawn at random below its own."""
    longest_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """The largest of these maxima, in seconds."""
    max_in_flight: Positive = 64
    """The maximum number of requests that wait for one server at once."""
    max_lost_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The fraction of a step's rollouts that servers may lose. A step that loses more ends the run, which can be resumed."""

    @model_validator(mode="after")
    def _waits_grow(self) -> "RemoteConfig":
        if self.longest_wait_s < self.first_wait_s:
            raise ValueError(
                f"longest_wait_s = {self.longest_wait_s:g} is below first_wait_s = {self.first_wait_s:g}; raise it"
            )
        return self


class ClusterConfig(Node):
    """A run on a Ray cluster (`backend = "ray"`). Ray places each part where enough GPUs and CPUs are free.

    A fraction of a CPU, or 0, is a booking, not a limit.
    """

    address: str | None = None
    """The address of a running Ray cluster; "auto" finds it. Without one, Ray starts on this machine."""
    learner_ranks: Positive = 1
    """The processes that share the student's weights (FSDP2)."""
    gpus_per_rank: NonNegative = 0
    """The GPUs of a rank: 0 or 1. At 0 it computes on CPUs."""
    cpus_per_rank: Annotated[float, Field(ge=0)] = 1.0
    """The CPUs that Ray books for a rank."""
    engines: Positive = 1
    """The vLLM servers that sample from the student."""
    gpus_per_engine: NonNegative = 0
    """The GPUs of such a server."""
    cpus_per_engine: Annotated[float, Field(ge=0)] = 1.0
    """The CPUs that Ray books for each engine, those of teachers too."""
    engine_command: list[str] = Field(default_factory=lambda: ["vllm", "serve"], min_length=1)
    """The command that starts an engine, in any environment that has vLLM. Teachers' engines start with it too."""
    engine_args: list[str] = Field(default_factory=list)
    """More arguments for the student's engines, after those of opd."""
    engine_start_s: Annotated[float, Field(gt=0)] = 900.0
    """The time in which an engine must answer after its start, in seconds. 900, because a large model loads and compiles for
    minutes."""
    merge_adapter: bool = False
    """Merges the student's adapter into the weights of each engine, in place. Off, because an adapter beside the base is the
    smallest thing to send; merged it costs nothing while sampling."""
    teachers_sleep: bool = False
    """Lets the engines of all teachers share their devices, with one model awake at a time. vLLM sleeps only on GPUs."""
    max_staleness: NonNegative = 0
    """The maximum number of updates between the student that sampled a rollout and the student that learns from it. 0 is on-policy;
    above 0, opd samples and scores the next steps during an update."""
    mixed_precision: bool = False
    """Computes in bfloat16 on weights and gradients in float32. Off, because rounding in bfloat16 is a noise that a student close
    to its teacher follows."""
