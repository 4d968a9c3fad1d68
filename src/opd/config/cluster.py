"""Where the parts of a distributed run go."""

from typing import Annotated

from pydantic import Field

from opd.config.node import Node, NonNegative, Positive


class ClusterConfig(Node):
    """A run on a Ray cluster: `address` is that of a running one ("auto" finds it); without one, Ray starts on this machine.

    The learner's weights lie on `learner_ranks` processes, each with `gpus_per_rank` GPUs (0: it computes on CPUs). `engines` vLLM
    servers sample from the student, each with `gpus_per_engine`; `engine_command` starts one, in whatever environment has vLLM, and
    gets `engine_args` behind the arguments that opd gives it. An engine has `engine_start_s` seconds to answer. Ray places each
    where so many GPUs and CPUs are free; a share of a CPU, or none, is a booking, not a bound. Engines that teachers ask for are
    started with the same command; with `teachers_sleep` those of all models share their devices, and one model is awake at a time.

    merge_adapter: engines get the student's adapter merged into their weights, in place, instead of beside them.

    max_staleness: 0 is on-policy, step after step; above it the next steps are sampled and scored while one is learnt from, by a
    student that is at most so many updates older. mixed_precision: the learner computes in bfloat16 on weights and gradients in
    float32.
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
