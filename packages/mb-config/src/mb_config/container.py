# SPDX-License-Identifier: Apache-2.0
"""The one object every entry point takes."""

from __future__ import annotations

import attrs
from attrs import define, field

from mb_config._types import SECTION_NAMES, check_all, checked, hints
from mb_config.sections import (
    CheckpointConfig,
    CommOverlapConfig,
    CudaGraphConfig,
    DatasetConfig,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    LoRA,
    MixedPrecisionConfig,
    MockDatasetConfig,
    ModelConfig,
    OffloadConfig,
    OptimizerConfig,
    PEFTConfig,
    ProfilingConfig,
    RecomputeConfig,
    RNGConfig,
    SchedulerConfig,
    TextDatasetConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)


@define(kw_only=True, on_setattr=checked)
class ConfigContainer:
    """Everything a run is told, one section a concern.

    Attributes:
        model: Architecture and model parallelism.
        train: Batches, duration and exits.
        validation: Evaluation.
        optimizer: Optimizer and loss scaling.
        scheduler: Learning rate and weight decay over time.
        dataset: What to train on.
        tokenizer: Text to tokens.
        checkpoint: Saving and loading.
        logger: What to report and where.
        dist: Processes and devices.
        ddp: Data parallelism.
        rng: Seeds.
        mixed_precision: A name or a section; null means float32.
        comm_overlap: Overlap of communication in tensor, pipeline and expert parallelism.
        recompute: Activation recomputation.
        offload: Offloading to host memory.
        cuda_graph: CUDA graphs.
        profiling: Profiler.
        peft: Parameter-efficient finetuning; null trains all parameters.
        env_vars: Environment variables to set where they are not yet set.

    __attrs_post_init__ = check_all
    """

    model: ModelConfig = field(factory=ModelConfig)
    train: TrainingConfig = field(factory=TrainingConfig)
    validation: ValidationConfig = field(factory=ValidationConfig)
    optimizer: OptimizerConfig = field(factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(factory=SchedulerConfig)
    dataset: DatasetConfig = field(factory=TextDatasetConfig)
    tokenizer: TokenizerConfig = field(factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(factory=CheckpointConfig)
    logger: LoggerConfig = field(factory=LoggerConfig)
    dist: DistributedInitConfig = field(factory=DistributedInitConfig)
    ddp: DistributedDataParallelConfig = field(factory=DistributedDataParallelConfig)
    rng: RNGConfig = field(factory=RNGConfig)
    mixed_precision: str | MixedPrecisionConfig | None = None
    comm_overlap: CommOverlapConfig = field(factory=CommOverlapConfig)
    recompute: RecomputeConfig = field(factory=RecomputeConfig)
    offload: OffloadConfig = field(factory=OffloadConfig)
    cuda_graph: CudaGraphConfig = field(factory=CudaGraphConfig)
    profiling: ProfilingConfig = field(factory=ProfilingConfig)
    peft: PEFTConfig | None = None
    env_vars: dict[str, str | int | float | bool] = field(factory=dict)

    __attrs_post_init__ = check_all


SECTION_NAMES.update(
    {hint: name for name, hint in hints(ConfigContainer).items() if attrs.has(hint)}
    | {TextDatasetConfig: "dataset", MockDatasetConfig: "dataset", LoRA: "peft"}
    | {MixedPrecisionConfig: "mixed_precision", ConfigContainer: ""}
)
