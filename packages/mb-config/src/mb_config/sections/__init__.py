# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration, one concern each."""

from mb_config.sections.checkpoint import CheckpointConfig
from mb_config.sections.cuda_graph import CudaGraphConfig
from mb_config.sections.dataset import DatasetConfig, MockDatasetConfig, TextDatasetConfig
from mb_config.sections.dataset_indexed import IndexedDatasetConfig
from mb_config.sections.dataset_sft import SFTDatasetConfig
from mb_config.sections.distributed import DistributedDataParallelConfig, DistributedInitConfig
from mb_config.sections.logger import LoggerConfig
from mb_config.sections.memory import OffloadConfig, RecomputeConfig
from mb_config.sections.model import ModelConfig
from mb_config.sections.optimizer import OptimizerConfig
from mb_config.sections.overlap import CommOverlapConfig
from mb_config.sections.peft import LoRA, PEFTConfig
from mb_config.sections.precision import MixedPrecisionConfig
from mb_config.sections.profiling import ProfilingConfig
from mb_config.sections.rng import RNGConfig
from mb_config.sections.scheduler import SchedulerConfig
from mb_config.sections.tokenizer import TokenizerConfig
from mb_config.sections.training import TrainingConfig
from mb_config.sections.validation import ValidationConfig

__all__ = [
    "CheckpointConfig",
    "CommOverlapConfig",
    "CudaGraphConfig",
    "DatasetConfig",
    "DistributedDataParallelConfig",
    "DistributedInitConfig",
    "IndexedDatasetConfig",
    "LoRA",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "MockDatasetConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "PEFTConfig",
    "ProfilingConfig",
    "RNGConfig",
    "RecomputeConfig",
    "SFTDatasetConfig",
    "SchedulerConfig",
    "TextDatasetConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ValidationConfig",
]
