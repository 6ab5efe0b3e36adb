# SPDX-License-Identifier: Apache-2.0
"""megatron-core's indexed token files, split, shuffled and blended by megatron-core."""

from __future__ import annotations

import importlib.util
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from mb_engine.data import locations, sample_store
from mb_engine.data.errors import DataError
from mb_engine.data.indexed_build import INDEX_HEADER
from mb_engine.data.records import unreadable
from mb_engine.data.tokenizers import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config import ConfigContainer
    from numpy.typing import NDArray

    from mb_engine.data.tokenizers import Tokenizer

_HELPER = "megatron.core.datasets.helpers_cpp"
_COUNTS = struct.Struct("<QBQQ")  # version, element type, sequences, documents and one
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # by element type
_EVERYTHING = "0,1,0"  # a set that is for validation alone


@frozen(eq=False)
class IndexedSamples:
    """A map-style view of a data set of megatron-core.

    Attributes:
        dataset: megatron-core's ``GPTDataset`` or ``BlendedDataset``.
        boundaries_at: The id after which a packed row has a boundary; None for rows that are not.
    """

    dataset: Any
    boundaries_at: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample: int64 ``[S]`` tokens, labels, position_ids, float32 ``loss_mask``."""
        sample = self.dataset[int(index)]
        return {k: sample[k] for k in ("tokens", "labels", "position_ids", "loss_mask")}

    def get_batch(self, index: NDArray[np.int64], epoch: NDArray[np.int64]) -> dict[str, Any]:
        """Return the samples at *index* ``[B]``, stacked; a packed one with its ``cu_seqlens``."""
        del epoch
        items = [self[i] for i in index.tolist()]
        batch = {name: np.stack([np.asarray(item[name]) for item in items]) for name in items[0]}
        if self.boundaries_at is not None:
            row = batch["tokens"][0]
            ends = np.flatnonzero(row == self.boundaries_at) + 1
            batch["cu_seqlens"] = np.unique([0, *ends, len(row)]).astype(np.int32)
            batch["max_seqlen"] = np.array(len(row))
        return batch


def build_indexed(
    config: ConfigContainer, tokenizer: Tokenizer
) -> tuple[IndexedSamples | None, dict[str, IndexedSamples], IndexedSamples | None]:
    """Return the training, validation and test sets of ``dataset.type=indexed``.

    megatron-core keeps its shuffled indices in a folder; the first process of a machine makes them,
    the others read them.

    Raises:
        DataError: If a file is missing or damaged, or megatron-core's compiled helper is missing.
    """
    settings: Any = config.dataset
    shares = [float(share) for share in settings.split.split(",")]
    prefixes = _checked(settings.path, "dataset.path", shares)
    _prepare(config)
    parts = _build(
        config,
        tokenizer,
        prefixes,
        weights=settings.weights,
        split=settings.split,
        sizes=(_training_samples(config), *[_evaluation_samples(config)] * 2),
    )
    named = {
        name: _build(
            config,
            tokenizer,
            _checked([path], f"dataset.validation_paths.{name}"),
            split=_EVERYTHING,
            sizes=(None, None, None),
        )[1]
        for name, path in settings.validation_paths.items()
    }
    valid = {"validation": parts[1], **named}
    return parts[0], {k: v for k, v in valid.items() if v is not None}, parts[2]


def _build(
    config: ConfigContainer,
    tokenizer: Tokenizer,
    prefixes: Sequence[str],
    *,
    split: str,
    sizes: tuple[int | None, ...],
    weights: Sequence[float] | None = None,
) -> list[IndexedSamples | None]:
    from mb_engine.runtime.megatron_compat import without_process_group

    settings: Any = config.dataset
    cache = sample_store.cache_folder(settings.cache_dir, prefixes[0])
    boundary = tokenizer.eod if settings.reset_attention_mask else None
    with (
        sample_store.locked(cache, "indexed"),
        without_process_group(),
        warnings.catch_warnings(),
    ):
        # About padding, of which there is none, and a rank, which does not matter.
        warnings.simplefilter("ignore")
        blend = (list(prefixes), None if weights is None else list(weights))
        builder = _builder(config, tokenizer, cache, blend=blend, split=split, sizes=list(sizes))
        try:
            datasets = builder.build()
        except Exception as error:  # megatron-core asserts, or lets numpy fail
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"megatron-core cannot read {', '.join(prefixes)} with split={split!r} ({reason});"
                " make the files anew with mb-train data build, or change dataset.split"
            ) from error
    return [None if d is None else IndexedSamples(d, boundary) for d in datasets]


def _builder(
    config: ConfigContainer,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    blend: tuple[list[str], list[float] | None],
    split: str,
    sizes: list[int | None],
) -> Any:
    """Return megatron-core's builder of blended data sets."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    settings: Any = config.dataset
    remote = any(map(locations.is_remote, blend[0]))
    made = GPTDatasetConfig(
        random_seed=config.rng.seed,
        sequence_length=int(settings.seq_length or config.model.seq_length),
        blend=blend,
        split=split,
        path_to_cache=str(cache / "indexed"),
        mmap_bin_files=settings.mmap and not remote,
        object_storage_cache_path=str(cache / "index") if remote else None,
        tokenizer=_ForMegatron(tokenizer),
        reset_position_ids=settings.reset_position_ids,
        reset_attention_mask=False,  # boundaries of a packed row do it
        eod_mask_loss=settings.eod_mask_loss,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, made)


class _ForMegatron:
    """What megatron-core's data sets ask of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod, self.vocab_size = tokenizer.eod, tokenizer.vocab_size
        self.unique_identifiers = {"fingerprint": fingerprint(tokenizer)}


def _prepare(config: ConfigContainer) -> None:
    """Import megatron-core as the runtime will use it.

    Raises:
        DataError: If its compiled helper is missing.
    """
    from mb_engine.runtime import megatron_compat, megatron_cpu
    from mb_engine.runtime.device import select_device

    if select_device(config.dist).type == "cpu":
        megatron_cpu.install()
    megatron_compat.prepare_megatron()
    if importlib.util.find_spec(_HELPER) is None:
        raise DataError(
            "dataset.type=indexed needs megatron-core's compiled helper, which this installation"
            " lacks; reinstall its wheel (pip install --force-reinstall --no-deps megatron-core),"
            " or build it with a C++ compiler as docs/data.md shows"
        )


def _checked(prefixes: Sequence[str], setting: str, shares: Sequence[float] = (1.0,)) -> list[str]:
    if not prefixes:
        raise DataError(f"{setting} names no files; name the prefix of a .bin and an .idx file")
    found = []
    for prefix in prefixes:
        path = prefix if locations.is_remote(prefix) else str(Path(prefix).expanduser())
        path = path.removesuffix(".bin").removesuffix(".idx")
        _check_store(path, setting)
        try:
            _check_files(path, setting)
            sequences = _check_index(path, setting)
        except OSError as error:
            raise unreadable(path, error) from error
        ends = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * sequences)
        if any(share and a == b for share, a, b in zip(shares, ends, ends[1:], strict=False)):
            # megatron-core would look for tokens among no documents for ever
            raise DataError(
                f"{setting}: {path} has {sequences} documents, which leaves a part of the split"
                f" {', '.join(f'{s:g}' for s in shares)} without any; change dataset.split"
            )
        found.append(path)
    return found


def _check_files(path: str, setting: str) -> None:
    for suffix in (".idx", ".bin"):
        if not locations.is_file(path + suffix):
            raise DataError(
                f"{setting}: {path}{suffix} does not exist; name the prefix of a .bin and an"
                " .idx file (mb-train data build makes them)"
            )


def _check_store(path: str, setting: str) -> None:
    """Refuse object stores that megatron-core does not read tokens from."""
    if not locations.is_remote(path):
        return
    if not path.startswith("s3://"):
        raise DataError(
            f"{setting}: {path}: megatron-core streams tokens from s3:// alone; copy the files to a"
            " folder, or to a store with that interface"
        )
    if importlib.util.find_spec("boto3") is None:
        raise DataError(f"{setting}: {path} is read with boto3; pip install boto3")


def _check_index(path: str, setting: str) -> int:
    """Return how many sequences there are; refuse files that megatron-core would fail on later: no index, or other than the tokens."""
    index, tokens = path + ".idx", locations.stamp(path + ".bin").size
    with locations.open_bytes(index) as file:
        head = file.read(len(INDEX_HEADER) + _COUNTS.size)
        if not head.startswith(INDEX_HEADER) or len(head) < len(INDEX_HEADER) + _COUNTS.size:
            raise DataError(
                f"{setting}: {index} is not an index of megatron-core; make it anew with"
                " mb-train data build"
            )
        _, code, sequences, _ = _COUNTS.unpack(head[len(INDEX_HEADER) :])
        file.seek(len(head) + 4 * (sequences - 1))
        last = struct.unpack("<i", file.read(4))[0] if sequences else 0
        file.seek(len(head) + 4 * sequences + 8 * (sequences - 1))
        rest = file.read(8)
    start = struct.unpack("<q", rest)[0] if len(rest) == 8 and sequences else 0
    if code not in _ITEM_BYTES or start + last * _ITEM_BYTES[code] != tokens:
        raise DataError(
            f"{setting}: {path}.bin has {tokens} bytes, but {index} describes another number; one of"
            " them is damaged or of another build: make both anew with mb-train data build"
        )
    return int(sequences)


def _training_samples(config: ConfigContainer) -> int | None:
    from mb_engine.train.batch_size import BatchSizeSchedule

    steps = config.train.train_iters
    return BatchSizeSchedule.from_config(config).samples_at_iteration(steps) if steps else None


def _evaluation_samples(config: ConfigContainer) -> int | None:
    """Return the samples of one evaluation; None, an epoch, where that is not blended."""
    settings: Any = config.dataset
    if settings.weights is None:
        return None
    validation = config.validation
    size = validation.eval_global_batch_size or config.train.global_batch_size or 1
    return max(1, validation.eval_iters) * size
