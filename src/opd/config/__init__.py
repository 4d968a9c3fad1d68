"""The configuration: what a recipe may say, with every default, range and cross-field rule.

A recipe is TOML; `key=value` pairs on the command line override it (`optimizer.lr=1e-5`). Unknown keys are errors that
name the nearest known key. Importing this package needs no torch.
"""

from opd.config.cluster import ClusterConfig
from opd.config.detectors import DetectorsConfig
from opd.config.episodes import EpisodesConfig
from opd.config.format_checks import ChecksConfig
from opd.config.no_effect import changed, without_effect
from opd.config.node import nearest
from opd.config.objective import CorrectionConfig, MaskConfig, ObjectiveConfig, RewardConfig
from opd.config.parse import AnyConfig, dump_config, load_config, parse_config
from opd.config.resume import config_changes, resumed_config
from opd.config.teachers import RemoteConfig, TeacherConfig
from opd.config.tree import (
    AlignmentConfig,
    ComputeConfig,
    Config,
    EvaluationConfig,
    FileTask,
    LoggingConfig,
    LoraConfig,
    OptimizerConfig,
    ReasoningGymTask,
    SamplingConfig,
    SftConfig,
    TaskConfig,
    TextArenaTask,
    ToolTask,
    WarmupConfig,
)

__all__ = [
    "AlignmentConfig",
    "AnyConfig",
    "ChecksConfig",
    "ClusterConfig",
    "ComputeConfig",
    "Config",
    "CorrectionConfig",
    "EpisodesConfig",
    "EvaluationConfig",
    "FileTask",
    "DetectorsConfig",
    "LoggingConfig",
    "LoraConfig",
    "MaskConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RewardConfig",
    "ReasoningGymTask",
    "SamplingConfig",
    "RemoteConfig",
    "SftConfig",
    "TaskConfig",
    "TeacherConfig",
    "TextArenaTask",
    "ToolTask",
    "WarmupConfig",
    "changed",
    "config_changes",
    "dump_config",
    "load_config",
    "resumed_config",
    "nearest",
    "parse_config",
    "without_effect",
]
