"""Where the parts of a distributed run go."""

from typing import Annotated

from pydantic import Field

from opd.config.node import Node, NonNegative, Positive


class ClusterConfig(Node):
    """A run on a Ray cluster: `address` is that of a running one ("auto" finds it); without one, Ray starts on this machine.

    The learner's weights lie on `learner_ranks` processes, each with `gpus_per_rank` GPUs (0: CPUs). `engines` vLLM servers sample
    from the student, each with `gpus_per_engine`; `engine_command` starts one, in whatever environment has vLLM, and gets
    `engine_args` behind the arguments that opd gives it. An engine has `engine_start_s` seconds to answer.

    mixed_precision: the learner computes in bfloat16 on weights and gradients in float32.
    """

    address: str | None = None
    learner_ranks: Positive = 1
    gpus_per_rank: NonNegative = 0
    cpus_per_rank: Positive = 1
    engines: Positive = 1
    gpus_per_engine: NonNegative = 0
    cpus_per_engine: Positive = 1
    engine_command: list[str] = Field(default_factory=lambda: ["vllm", "serve"], min_length=1)
    engine_args: list[str] = Field(default_factory=list)
    engine_start_s: Annotated[float, Field(gt=0)] = 900.0
    mixed_precision: bool = False
