"""The work that opd and TRL's DistillationTrainer are given side by side: the demo's letters task, its expert, LoRA 16.

The same prompts, batch, adapter and objective (the exact reverse KL) in float32, one checkpoint for student and teacher. TRL has
its teacher's adapter merged, and no gradient checkpointing unless it is asked for: its faster settings.
"""

from dataclasses import replace
from pathlib import Path

from in_turns import PEERS

import opd
from opd.config import Config
from opd.data.tasks import TaskData, read_tasks
from opd.episodes.player import EpisodePlayer, one_turn
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.sampler import LocalSampler
from opd.loop import Components
from opd.run import make_components
from opd.text.chat import Chat

_HERE = Path(__file__).parent
SHAPES = {"8x4": (8, 4), "32x1": (32, 1)}


def opd_parts(
    shape: str, tokens: int, steps: int, overrides: list[str], *, endless: bool
) -> tuple[Config, LocalBackend, TaskData, Components]:
    """A run of opd, about to begin; with `endless` no end token ends a response."""
    prompts, group = SHAPES[shape]
    sizes = {"prompts_per_step": prompts, "group_size": group, "max_new_tokens": tokens}
    settings = [f"sampling.{name}={size}" for name, size in sizes.items()]
    config = opd.load_config(_HERE / "work.toml", [*settings, f"steps={steps}", *overrides])
    task_data = read_tasks(config, None, None)
    backend = build(config, task_data.make_environment)
    parts = make_components(config, backend, task_data)
    if endless:
        network = backend.student.network
        player = EpisodePlayer(Chat(network.tokenizer), config.episodes, end_ids=(), make_environment=one_turn)
        sampler = LocalSampler(
            network,
            adapter=backend.student.adapter,
            temperature=1.0,
            max_new_tokens=tokens,
            max_rows=config.sampling.max_rows,
            max_tokens=config.compute.max_tokens,
            player=player,
        )
        parts = replace(parts, sampler=sampler)
    return config, backend, task_data, parts


def trl_command(shape: str, tokens: int, steps: int, *options: object) -> list[str]:
    """The same for TRL, as a command line."""
    prompts, group = SHAPES[shape]
    sizes = {"--num-prompts": prompts, "--group": group, "--tokens": tokens, "--steps": steps}
    return [
        str(PEERS), str(_HERE / "peers" / "trl_distillation.py"), "--student", "models/smollm2-135m-instruct",
        "--expert", "examples/merge/letters", "--prompts", "examples/merge/letters_train.jsonl",
        *(str(part) for pair in sizes.items() for part in pair), *map(str, options),
    ]  # fmt: skip
