"""The configuration: every key that a recipe may have, with its default, range and rules across keys.

A recipe is TOML; `key=value` pairs on the command line override it (`optimizer.lr=1e-5`). Unknown keys are errors that
name the nearest known key. Importing this package needs no torch.
"""

from opd.config.detectors import DetectorsConfig as DetectorsConfig
from opd.config.node import nearest as nearest
from opd.config.objective import CorrectionConfig as CorrectionConfig
from opd.config.objective import MaskConfig as MaskConfig
from opd.config.objective import ObjectiveConfig as ObjectiveConfig
from opd.config.objective import RewardConfig as RewardConfig
from opd.config.parse import AnyConfig as AnyConfig
from opd.config.parse import config_changes as config_changes
from opd.config.parse import continued_config as continued_config
from opd.config.parse import dump_config as dump_config
from opd.config.parse import load_config as load_config
from opd.config.parse import parse_config as parse_config
from opd.config.parse import read_recipe as read_recipe
from opd.config.parse import resumed_config as resumed_config
from opd.config.tasks import ChecksConfig as ChecksConfig
from opd.config.tasks import EpisodesConfig as EpisodesConfig
from opd.config.tasks import FileTask as FileTask
from opd.config.tasks import GeneratedTask as GeneratedTask
from opd.config.tasks import PythonTask as PythonTask
from opd.config.tasks import ReasoningGymTask as ReasoningGymTask
from opd.config.tasks import TaskConfig as TaskConfig
from opd.config.tasks import TextArenaTask as TextArenaTask
from opd.config.tasks import ToolTask as ToolTask
from opd.config.teachers import Quantization as Quantization
from opd.config.teachers import RemoteConfig as RemoteConfig
from opd.config.teachers import TeacherConfig as TeacherConfig
from opd.config.tree import AlignmentConfig as AlignmentConfig
from opd.config.tree import ComputeConfig as ComputeConfig
from opd.config.tree import Config as Config
from opd.config.tree import LoraConfig as LoraConfig
from opd.config.tree import OptimizerConfig as OptimizerConfig
from opd.config.tree import SftConfig as SftConfig
