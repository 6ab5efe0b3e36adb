# SPDX-License-Identifier: Apache-2.0
"""The one object every entry point takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field

from mb_config._types import SECTION_NAMES, check_all, checked, concise, hints
from mb_config.sections import (
    CheckpointConfig,
    CommOverlapConfig,
    CudaGraphConfig,
    DatasetConfig,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    IndexedDatasetConfig,
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
    SFTDatasetConfig,
    TextDatasetConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from mb_config.compare import Difference
    from mb_config.provenance import Origin


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

    _origins: dict[str, Origin] = field(factory=dict, init=False, repr=False, eq=False)

    __attrs_post_init__ = check_all
    __repr__ = concise

    def finalize(self, world_size: int) -> ConfigContainer:
        """Return a resolved copy for *world_size* ranks; this container stays as it is.

        Every derived value is filled in and every rule between fields checked. It is pure and
        idempotent. What was derived is remembered apart from the values: change anything in the
        result and finalize again, and derived values follow, while what you set yourself stays. An
        assignment of the very value that was derived does not count as setting it.

        Args:
            world_size: Ranks of the job.

        Raises:
            ConfigError: With every broken rule, each naming field, value, rule and remedy.
        """
        from mb_config.resolve import finalize

        return finalize(self, world_size)

    def override(self, *overrides: str) -> ConfigContainer:
        """Return a copy with dotted overrides such as ``"train.train_iters=50"`` or ``"~peft"``.

        Values are YAML, with ``3e-4`` a float. A section that is None is made; ``dataset.type=mock``
        switches the variant; ``~path`` puts a field or section back to its default.

        Raises:
            ConfigError: Naming the override, with a near name for an unknown field.
        """
        from mb_config import overrides as dotted

        return dotted.apply(self, overrides)

    def explain(self, path: str) -> str:
        """Return a field's value and where it is from; a line for each field of a section.

        Raises:
            ConfigError: If there is no such field.
        """
        from mb_config import provenance

        return provenance.explain(self, path)

    def diff(self, other: ConfigContainer) -> tuple[Difference, ...]:
        """Return what is different in *other*; print one to see ``field: this -> other``."""
        from mb_config import compare

        return compare.diff(self, other)

    def fingerprint(self, *sections: str) -> str:
        """Return 16 hex digits that are the same for equal *sections*, or for all of them.

        Raises:
            ConfigError: If a section does not exist.
        """
        from mb_config import compare

        return compare.fingerprint(self, *sections)

    def to_dict(self, *, derived: bool = True) -> dict[str, Any]:
        """Return plain data that ``from_dict`` turns back into an equal container.

        Args:
            derived: False puts what finalize derived back to what it was before.
        """
        from mb_config import io

        return io.to_dict(self, derived=derived)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConfigContainer:
        """Return the container that plain *data* describes; missing fields have their default.

        Raises:
            ConfigError: With every unknown key and every wrong type.
        """
        from mb_config import io

        return io.from_dict(data)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ConfigContainer:
        """Return the container in a YAML file.

        Raises:
            ConfigError: Naming the file, with every unknown key and every wrong type.
        """
        from mb_config import io

        return io.load(path, "YAML")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> ConfigContainer:
        """Return the container in a JSON file; errors as in ``from_yaml``."""
        from mb_config import io

        return io.load(path, "JSON")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> ConfigContainer:
        """Return the container in a TOML file; errors as in ``from_yaml``."""
        from mb_config import io

        return io.load(path, "TOML")

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the container as YAML, and write it to *path* if given.

        Files hold what was asked for: what finalize derived is not written but follows again from
        the next finalize, on any number of ranks; comments at the end say what it was.
        """
        from mb_config import io

        return io.save(self, "YAML", path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the container as JSON, without derived values; see ``to_yaml``."""
        from mb_config import io

        return io.save(self, "JSON", path)

    def to_toml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the container as TOML, without derived values; see ``to_yaml``.

        Raises:
            ConfigError: If a value inside a list or mapping is None, which TOML cannot say.
        """
        from mb_config import io

        return io.save(self, "TOML", path)


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema (draft 2020-12) of configuration files.

    It has types, choices, ranges, defaults, and descriptions out of the docstrings. Put
    ``# yaml-language-server: $schema=config.schema.json`` on top of a YAML file to have an editor
    use it.
    """
    from mb_config import schema

    return schema.build()


SECTION_NAMES.update(
    {hint: name for name, hint in hints(ConfigContainer).items() if attrs.has(hint)}
    | {TextDatasetConfig: "dataset", MockDatasetConfig: "dataset", LoRA: "peft"}
    | {SFTDatasetConfig: "dataset", IndexedDatasetConfig: "dataset"}
    | {MixedPrecisionConfig: "mixed_precision", ConfigContainer: ""}
)
