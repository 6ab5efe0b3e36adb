# SPDX-License-Identifier: Apache-2.0
"""From ``config.dataset`` to the data sets of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from mb_config.sections import (
    IndexedDatasetConfig,
    MockDatasetConfig,
    SFTDatasetConfig,
    TextDatasetConfig,
)

from mb_engine.data import hashing
from mb_engine.data.errors import DataError
from mb_engine.data.mock import MockDataset
from mb_engine.data.sft_dataset import SFTDataset
from mb_engine.data.text import load_tokens, split_tokens
from mb_engine.data.windows import TokenWindows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ConfigContainer
    from numpy.typing import NDArray

    from mb_engine.data.tokenizers import Tokenizer

VALIDATION = "validation"
_ROW_MULTIPLE = 64  # of rows packed in a batch: keeps the number of different lengths small
_PARTS = ("train", VALIDATION, "test")


@frozen(kw_only=True)
class Datasets:
    """The data sets of a run; each has ``__len__`` and ``__getitem__``, see ``data.loader``.

    Attributes:
        train: What is trained on.
        valid: Validation sets by name; the one split off the training data is ``"validation"``.
        test: What the split keeps for a test, None without.
    """

    train: Any
    valid: Mapping[str, Any] = field(factory=dict)
    test: Any = None


def build_datasets(config: ConfigContainer, tokenizer: Tokenizer) -> Datasets:
    """Return the data sets that the resolved *config* describes.

    A class of one's own in place of ``config.dataset`` has a method
    ``build_datasets(config, tokenizer) -> Datasets``.

    Raises:
        DataError: If data is missing, empty or too short; one line that names the file.
    """
    settings = config.dataset
    if isinstance(settings, TextDatasetConfig):
        return _text_datasets(config, settings, tokenizer)
    if isinstance(settings, SFTDatasetConfig):
        return _sft_datasets(config, settings, tokenizer)
    if isinstance(settings, IndexedDatasetConfig):
        return _indexed_datasets(config, tokenizer)
    if isinstance(settings, MockDatasetConfig):
        return _mock_datasets(config, settings, tokenizer)
    own = getattr(settings, "build_datasets", None)
    if own is None:
        raise DataError(
            f"dataset={type(settings).__name__} does not say how to build it; give the class a"
            " method build_datasets(config, tokenizer) that returns mb_engine.data.Datasets"
        )
    built = own(config, tokenizer)
    return built if isinstance(built, Datasets) else Datasets(train=built)


def parse_split(split: str) -> tuple[float, float, float]:
    """Return the shares of train, validation and test that *split* such as ``"90,10,0"`` names.

    Raises:
        DataError: If it is anything but one to three numbers, none negative, the first positive.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= s < float("inf") for s in shares) or not shares[0]:
        raise DataError(
            f"dataset.split={split!r}: expected the shares of train, validation and test, the first"
            " above 0; write it like 90,10,0"
        )
    train, valid, test = (*shares, 0.0, 0.0)[:3]
    return train, valid, test


def _text_datasets(
    config: ConfigContainer, settings: TextDatasetConfig, tokenizer: Tokenizer
) -> Datasets:
    tokens = load_tokens(settings.path, tokenizer, setting="dataset.path")
    shares = parse_split(settings.split)
    parts: dict[str, TokenWindows] = {}
    for name, share, part in zip(_PARTS, shares, split_tokens(tokens, shares), strict=True):
        if share:
            label = f"the {name} part of dataset.path (dataset.split={settings.split})"
            # only what is read more than once gains from other windows
            shifted = settings.random_offset and name == "train"
            parts[name] = _windows(config, part, name=label, random_offset=shifted)
    valid = {VALIDATION: parts[VALIDATION]} if VALIDATION in parts else {}
    for name, path in settings.validation_paths.items():
        setting = f"dataset.validation_paths.{name}"
        if name in valid:
            raise DataError(
                f"{setting}: the part that dataset.split={settings.split} holds back has this name"
                " already; choose another"
            )
        own = load_tokens([path], tokenizer, setting=setting)
        valid[name] = _windows(config, own, name=f"{setting}={path}")
    return Datasets(train=parts["train"], valid=valid, test=parts.get("test"))


def _windows(
    config: ConfigContainer, tokens: NDArray[Any], *, name: str, random_offset: bool = False
) -> TokenWindows:
    return TokenWindows(
        tokens=tokens,
        seq_length=_seq_length(config),
        random_offset=random_offset,
        seed=config.rng.seed,
        name=name,
    )


def _sft_datasets(
    config: ConfigContainer, settings: SFTDatasetConfig, tokenizer: Tokenizer
) -> Datasets:
    from mb_engine.data.sft_prepare import Part, prepare

    def make(part: Part) -> SFTDataset:
        multiple = settings.pad_to_multiple or 1
        return SFTDataset(
            store=prepare(config, tokenizer, part),
            seq_length=_seq_length(config),
            pad_id=tokenizer.eod,
            packing=settings.packing,
            multiple=multiple,
            row_multiple=math.lcm(multiple, _ROW_MULTIPLE, _split_of_rows(config)),
        )

    shares = parse_split(settings.split)
    ends = [sum(shares[:i]) / sum(shares) for i in range(4)]
    made: dict[str, SFTDataset] = {}
    for name, share, low, high in zip(_PARTS, shares, ends, ends[1:], strict=False):
        if share:
            weights = settings.weights if name == "train" else None
            part = Part(
                name=f"the {name} part of dataset.path",
                setting="dataset.path",
                paths=settings.path,
                weights=weights,
                share=(low, high),
            )
            made[name] = make(part)
    valid = {VALIDATION: made[VALIDATION]} if VALIDATION in made else {}
    for name, path in settings.validation_paths.items():
        setting = f"dataset.validation_paths.{name}"
        valid[name] = make(Part(name=setting, setting=setting, paths=[path]))
    return Datasets(train=made["train"], valid=valid, test=made.get("test"))


def _indexed_datasets(config: ConfigContainer, tokenizer: Tokenizer) -> Datasets:
    from mb_engine.data.indexed import build_indexed

    train, valid, test = build_indexed(config, tokenizer)
    return Datasets(train=train, valid=valid, test=test)


def _split_of_rows(config: ConfigContainer) -> int:
    """Return into how many parts ranks cut the tokens of a row."""
    model = config.model
    tp = model.tensor_model_parallel_size if model.sequence_parallel else 1
    return tp * model.context_parallel_size


def _mock_datasets(
    config: ConfigContainer, settings: MockDatasetConfig, tokenizer: Tokenizer
) -> Datasets:
    def make(num_samples: int, part: int) -> MockDataset:
        return MockDataset(
            num_samples=num_samples,
            seq_length=_seq_length(config),
            vocab_size=tokenizer.vocab_size,
            pattern=settings.pattern,
            seed=hashing.key(config.rng.seed, part),
        )

    held_out = settings.num_validation_samples
    valid = {VALIDATION: make(held_out, 1)} if held_out else {}
    return Datasets(train=make(settings.num_samples, 0), valid=valid)


def _seq_length(config: ConfigContainer) -> int:
    return int(config.dataset.seq_length or config.model.seq_length)
