"""On-policy distillation of language models.

    trainer = opd.Trainer("recipes/merge.toml", prompts=my_prompts, reward=my_reward, callbacks=[MyCallback()])
    result = trainer.fit()

Names are imported when first used, so that `import opd` and `opd --help` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.callbacks import STOP, Callback
    from opd.checks.notices import Finding
    from opd.config import Config, SftConfig, load_config, parse_config
    from opd.episodes.environment import Tool, ToolEnvironment
    from opd.errors import OpdError
    from opd.evaluate import Cell, ParityRow
    from opd.finetune import SftResult, resume_sft, sft
    from opd.logging.run_folder import read_metrics, read_rollouts
    from opd.loop import StepReport
    from opd.records import Prompt, Rollout, ScoredRollout
    from opd.roles import Environment, Step
    from opd.run import Result
    from opd.trainer import Trainer, train

__version__ = "0.1.0"

_HOMES = {
    "opd.callbacks": ("STOP", "Callback"),
    "opd.checks.notices": ("Finding",),
    "opd.config": ("Config", "SftConfig", "load_config", "parse_config"),
    "opd.episodes.environment": ("Tool", "ToolEnvironment"),
    "opd.errors": ("OpdError",),
    "opd.evaluate": ("Cell", "ParityRow"),
    "opd.logging.run_folder": ("read_metrics", "read_rollouts"),
    "opd.loop": ("StepReport",),
    "opd.records": ("Prompt", "Rollout", "ScoredRollout"),
    "opd.roles": ("Environment", "Step"),
    "opd.run": ("Result",),
    "opd.finetune": ("SftResult", "resume_sft", "sft"),
    "opd.trainer": ("Trainer", "train"),
}
__all__ = [
    "STOP",
    "Callback",
    "Cell",
    "Config",
    "Environment",
    "Finding",
    "OpdError",
    "ParityRow",
    "Prompt",
    "Result",
    "Rollout",
    "ScoredRollout",
    "SftConfig",
    "SftResult",
    "Step",
    "StepReport",
    "Tool",
    "ToolEnvironment",
    "Trainer",
    "load_config",
    "parse_config",
    "read_metrics",
    "read_rollouts",
    "resume_sft",
    "sft",
    "train",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'opd' has no attribute '{name}'")
