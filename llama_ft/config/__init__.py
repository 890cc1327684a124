"""The schema of `conf/`: every key, its type, its default and what is allowed.

Plain dataclasses that know nothing of Hydra. `OmegaConf.to_object` runs `__post_init__`, where values are checked;
each check names the key, the value it got and what is allowed.
"""

from llama_ft.config.checks import Combinations, DeviceChoice, Dtype, Format, Goal, OnBadRecord, TrainOn, UserError
from llama_ft.config.convert import ConvertConfig
from llama_ft.config.data_command import DataCommandConfig
from llama_ft.config.evaluate import EvaluateConfig
from llama_ft.config.generate import DecodingConfig, GenerateConfig
from llama_ft.config.groups import DataConfig, GpuConfig, ReportConfig, TrackerConfig, TrackerKind, TrackerMode
from llama_ft.config.model import FEATURES, FROM_CHECKPOINT, PACKAGE_DIR, ModelConfig
from llama_ft.config.parallel import ParallelConfig, Strategy
from llama_ft.config.plan import PlanConfig
from llama_ft.config.presets import config_dir
from llama_ft.config.source import TOKENIZER_FILES, ModelSource, TrainedSource, found_tokenizer, is_gguf, path_of
from llama_ft.config.techniques import TECHNIQUES, LoraConfig, MixedPrecisionConfig, NeftuneConfig, OptimConfig
from llama_ft.config.train import TrainConfig, read_config
from llama_ft.config.training import SEED, Optimizer, Order, Schedule, SweepConfig, TrainingConfig

SCHEMAS = {  # of the commands
    "data": DataCommandConfig,
    "train": TrainConfig,
    "report": ReportConfig,
    "plan": PlanConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
}
