"""On-policy distillation of language models.

    config = opd.load_config("recipes/merge.toml", ["steps=10"])
    result = opd.train(config, reward=my_reward, on_step=my_callback)

Names are imported when first used, so that `import opd` and `opd --help` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.config import Config, SftConfig, load_config, parse_config
    from opd.episodes.tools import Tool, ToolEnvironment
    from opd.errors import OpdError
    from opd.logging.run_folder import read_metrics, read_rollouts
    from opd.roles import Environment, Step
    from opd.sft import resume_sft, sft
    from opd.trainer import Result, check, evaluate_run, resume, train

__all__ = [
    "Config",
    "Environment",
    "OpdError",
    "Result",
    "SftConfig",
    "Step",
    "Tool",
    "ToolEnvironment",
    "check",
    "evaluate_run",
    "load_config",
    "parse_config",
    "read_metrics",
    "read_rollouts",
    "resume",
    "resume_sft",
    "sft",
    "train",
]
__version__ = "0.1.0"

_HOMES = {
    "opd.config": ("Config", "SftConfig", "load_config", "parse_config"),
    "opd.errors": ("OpdError",),
    "opd.sft": ("resume_sft", "sft"),
    "opd.trainer": ("Result", "check", "evaluate_run", "resume", "train"),
    "opd.logging.run_folder": ("read_metrics", "read_rollouts"),
    "opd.roles": ("Environment", "Step"),
    "opd.episodes.tools": ("Tool", "ToolEnvironment"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'opd' has no attribute '{name}'")
