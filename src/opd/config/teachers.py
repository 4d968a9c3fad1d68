"""Teachers: where each comes from, and how those behind a server are asked."""

from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from opd.config.node import Node, NonNegative, Positive

ServerKind: TypeAlias = Literal["vllm", "sglang"]
"""The kinds of servers; each has a case in `opd.remote.discovery.protocol_of`."""


class TeacherConfig(Node):
    """One teacher: a whole model (hub id, folder or GGUF file), a LoRA adapter of the student's own base, a model behind a
    server, or several others at once.

    `url` is that of a server (http://host:8000), or of several that serve the same model; `server` is its kind; `served_model` is
    its name there, needed where the server has several; `api_key_env` names the environment variable that holds the server's key,
    if it asks for one. `weights` names other teachers of [teachers]; they are scaled to sum to one, so that a prompt with three
    teachers does not weigh three times. The student then follows their normalised geometric mean.

    `template`: the chat template of the teacher's prompts, its "own" or the "student"'s. An adapter shares the
    student's, and a served model is asked in it.

    `engines`, with `model` or `adapter` in distributed mode: so many vLLM servers of it are started on the cluster (an adapter is
    merged into the student's base for them), each with `gpus_per_engine` and with `engine_args` behind the arguments that opd gives
    them. Teachers of one model share its servers.
    """

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
        """Whether it is asked over HTTP, wherever its server came from."""
        return self.url is not None or self.engines is not None

    @property
    def source(self) -> str | None:
        """The folder, file or hub id that its weights come from, if it is known."""
        return self.model or self.adapter

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses without a slash at their end; none of a teacher that is not served."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return tuple(u.rstrip("/").removesuffix("/v1") for u in given)

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if sum(source is not None for source in (self.model, self.adapter, self.url, self.weights)) != 1:
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
        if self.engines is not None and self.source is None:
            raise ValueError(
                f"engines = {self.engines} starts servers of a model; give it in model or adapter, or drop engines"
            )
        if self.engines is not None and (self.model or "").endswith(".gguf"):
            raise ValueError(
                f"engines = {self.engines}: they do not read '{self.model}'; give a folder with safetensors, or drop engines"
            )
        if self.engines is None:
            for field in ("gpus_per_engine", "engine_args"):
                if getattr(self, field):
                    raise ValueError(f"{field} belongs to engines; drop it, or say how many engines")
        return self

    @model_validator(mode="after")
    def _remote(self) -> "TeacherConfig":
        if self.url is None:
            for field, plain in (("served_model", None), ("api_key_env", None), ("server", "vllm")):
                if getattr(self, field) != plain:
                    raise ValueError(f"{field} belongs to url; drop it, or give the server's url")
            return self
        if not self.urls:
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
    """Whether its port, if it names one, is one."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


class RemoteConfig(Node):
    """Requests to served models. Each is tried `attempts` times, `timeout_s` seconds each, with waits between them that grow from
    `first_wait_s` to `longest_wait_s` and are drawn at random below that; at most `max_in_flight` wait for one server at once.

    What still fails is set aside with its reason. A step that loses more than `max_lost_fraction` of its rollouts in this way ends
    the run, which can be continued.
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
