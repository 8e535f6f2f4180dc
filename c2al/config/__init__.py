"""The configuration: frozen dataclasses, and the one way to read and write them."""

from c2al.config.data import Axis, DataConfig, DenseFeature, SparseFeature
from c2al.config.distribution import CACHED, DistConfig, Sharding, TableConfig
from c2al.config.judge import BASELINE, Arm, DiscoverConfig, EvaluateConfig, ExperimentConfig, flat_settings
from c2al.config.load import dump_config, load_config, parse_config, redacted_config, replace, save_config
from c2al.config.model import ExpertsConfig, FMConfig, ModelConfig
from c2al.config.schema import Config
from c2al.config.train import (
    OF_AUXILIARY_LOSSES,
    CheckpointConfig,
    EarlyStoppingConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "BASELINE",
    "CACHED",
    "OF_AUXILIARY_LOSSES",
    "Arm",
    "Axis",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DenseFeature",
    "DiscoverConfig",
    "DistConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "ExpertsConfig",
    "FMConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Sharding",
    "SparseFeature",
    "TableConfig",
    "TrainConfig",
    "dump_config",
    "flat_settings",
    "load_config",
    "parse_config",
    "redacted_config",
    "replace",
    "save_config",
]
