# SPDX-License-Identifier: Apache-2.0
"""From SFT files to prepared samples: read, tokenised, cut, mixed, packed, counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from attrs import frozen

from mb_engine.data import hashing
from mb_engine.data.chat import load_chat_template
from mb_engine.data.errors import DataError
from mb_engine.data.packing import pack
from mb_engine.data.records import BadRecords, read_records
from mb_engine.data.sample_store import (
    SampleStore,
    cache_folder,
    digests,
    prepared,
    write_rows,
)
from mb_engine.data.sft import Counts, Sample, SampleMaker
from mb_engine.data.text import expand
from mb_engine.data.tokenizers import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mb_config import ConfigContainer
    from numpy.typing import NDArray

    from mb_engine.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_PART, _MIX = 3, 4  # keep the keys of the split and of the mixture apart from others
# What of the section changes what is prepared.
_SETTINGS = (
    "messages_key", "tools_key", "prompt_key", "completion_key", "loss_on", "append_eod",
    "truncation", "bad_records", "seq_length", "pad_to_multiple",
)  # fmt: skip


@frozen(kw_only=True)
class Part:
    """A data set to prepare.

    Attributes:
        name: For messages and reports.
        setting: The field that names the files.
        paths: Its entries.
        weights: Of the entries; None to read each once.
        share: The records whose hash is from the first to the second of these, of 0 to 1.
    """

    name: str
    setting: str
    paths: Sequence[str]
    weights: Sequence[float] | None = None
    share: tuple[float, float] = (0.0, 1.0)


def prepare(config: ConfigContainer, tokenizer: Tokenizer, part: Part) -> SampleStore:
    """Return the samples of *part*, from the cache where nothing has changed.

    Raises:
        DataError: If files are missing or broken, or nothing is left to train on.
    """
    settings: Any = config.dataset
    template = load_chat_template(config.tokenizer)
    maker = SampleMaker(settings=settings, tokenizer=tokenizer, template=template)
    sources = [expand([path], setting=part.setting) for path in part.paths]
    if not sources:
        raise DataError(f"{part.setting} names no files; name JSONL or Parquet files")
    cache = cache_folder(settings.cache_dir, sources[0][0])
    depends_on = {
        "tokenizer": fingerprint(tokenizer),
        "template": None if template is None else [template.source, dict(template.special_tokens)],
        "settings": {name: getattr(settings, name) for name in _SETTINGS},
        "packed": settings.packing == "offline",
        "files": [digests(files) for files in sources],
        "weights": part.weights,
        "share": part.share,
        "seed": config.rng.seed,
    }
    folder = prepared(cache, depends_on, lambda where: _make(where, config, maker, sources, part))
    store = SampleStore.read(folder)
    logger.info("%s: %s (prepared in %s)", part.name, _in_words(store.report), folder)
    return store


def _make(
    folder: Path,
    config: ConfigContainer,
    maker: SampleMaker,
    sources: Sequence[Sequence[str]],
    part: Part,
) -> None:
    settings: Any = config.dataset
    seed = config.rng.seed
    bad = BadRecords(setting="dataset.bad_records", skip=settings.bad_records == "skip")
    samples: list[Sample] = []
    found: list[NDArray[np.int64]] = []
    reports = []
    for number, files in enumerate(sources):
        counts, begin = Counts(), len(samples)
        for path in files:
            samples += _read(path, maker, counts, bad, (part.share, hashing.key(seed, _PART)))
        found.append(np.arange(begin, len(samples), dtype=np.int64))
        reports.append({"path": part.paths[number], **attrs.asdict(counts)})
    if not samples:
        raise DataError(
            f"{part.setting}: no sample is left of {', '.join(part.paths)}"
            f" ({_in_words({'sources': reports})}); look at the data, dataset.split and"
            " dataset.truncation"
        )
    chosen = mix([len(f) for f in found], part.weights, seed=seed)
    for source, times in zip(reports, chosen, strict=True):
        source["samples_of_an_epoch"] = len(times)
    order = np.concatenate([f[i] for f, i in zip(found, chosen, strict=True)])
    report: dict[str, Any] = {"sources": reports, "bad_records": bad.examples}
    rows = list(order.reshape(-1, 1))
    if settings.packing == "offline":
        multiple = settings.pad_to_multiple or 1
        lengths = np.array([len(samples[i].ids) - 1 for i in order])
        packed = pack(-(-lengths // multiple) * multiple, settings.seq_length)
        rows = [order[packed.bin(i)] for i in range(len(packed))]
        filled = float(lengths.sum() / (len(packed) * packed.capacity))
        report["packing"] = {**packed.report(), "filled_with_tokens": round(filled, 6)}
    write_rows(folder, samples, rows, report)


def _read(
    path: str,
    maker: SampleMaker,
    counts: Counts,
    bad: BadRecords,
    share: tuple[tuple[float, float], int],
) -> list[Sample]:
    (low, high), key = share
    kept = []
    for record in read_records(path):
        place = int(hashing.hash_index(np.array([record.number]), key)[0]) / 2**64
        if not low <= place < high:
            continue
        counts.records += 1
        problem, sample = record.problem, None
        if record.value is not None:
            try:
                sample = maker.fit(maker.make(record.value), counts)
            except DataError as error:
                problem = str(error)
        if problem is not None:
            bad.note(path, record.number, problem)
            counts.bad += 1
        elif sample is not None:
            kept.append(sample)
    return kept


def mix(
    sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int
) -> list[NDArray[np.int64]]:
    """Return which samples of each source make up an epoch.

    The epoch is as long as all sources together; each gives its share by weight, in whole passes and
    a random part of it.

    Args:
        sizes: Samples of each source.
        weights: Of each source, positive; None to read each once.
        seed: Of the parts.

    Raises:
        DataError: If a source with a weight has no samples, or the numbers of both differ.
    """
    if weights is None:
        return [np.arange(size, dtype=np.int64) for size in sizes]
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise DataError(
            f"dataset.weights={list(weights)}: expected a positive number for each of the"
            f" {len(sizes)} entries of dataset.path"
        )
    if 0 in sizes:
        raise DataError(
            f"entry {sizes.index(0) + 1} of dataset.path has a weight but no samples; leave it out"
        )
    exact = np.array(weights) / sum(weights) * sum(sizes)
    parts = []
    for number, (size, wanted) in enumerate(zip(sizes, np.rint(exact).astype(int), strict=True)):
        passes, rest = divmod(int(wanted), size)
        drawn = hashing.hash_index(np.arange(size), hashing.key(seed, _MIX, number))
        some = np.sort(np.argsort(drawn, kind="stable")[:rest])
        parts.append(np.concatenate([np.tile(np.arange(size), passes), some]).astype(np.int64))
    return parts


def _in_words(report: Any) -> str:
    names = ("records", "bad", "truncated", "too_long", "nothing_learnt", "samples", "tokens")
    totals = {name: sum(source[name] for source in report["sources"]) for name in names}
    text = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in totals.items())
    packing = report.get("packing")
    return text if packing is None else f"{text}; {packing['bins']} rows, {_full(packing)} full"


def _full(packing: Any) -> str:
    return f"{100 * packing['filled_with_tokens']:.2f}%"
