# SPDX-License-Identifier: Apache-2.0
"""From JSONL, Parquet and text files to megatron-core's indexed token files, by many processes.

The input is cut into blocks of lines or row groups. A block's tokens are a file of their own until
all are done, so that a build that was interrupted goes on with the blocks that are missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import struct
from typing import IO, TYPE_CHECKING, Any

import attrs
import numpy as np
from attrs import field, frozen

from mb_engine.data import locations
from mb_engine.data.errors import DataError
from mb_engine.data.records import BadRecords, is_parquet, open_text, parse_line, unreadable
from mb_engine.data.text import expand, text_pieces
from mb_engine.data.tokenizer_libraries import require
from mb_engine.data.tokenizers import build_tokenizer, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from mb_config import TokenizerConfig

_BLOCK, _LARGEST = 1 << 20, 64 << 20  # bytes of a block of lines: of a small file, of a large one
_TOGETHER = 256  # documents that a tokenizer is given at once
INDEX_HEADER = b"MMIDIDX\x00\x00"  # of megatron-core's .idx files, with version 1
_CODES = {"uint16": 8, "int32": 4}  # of element types there


@frozen(kw_only=True)
class BuildOptions:
    """What to build.

    Attributes:
        inputs: Files or patterns, here or in object stores: ``.jsonl`` (also ``.gz``), ``.parquet``; any other is text, a file
            a document.
        output: Prefix of the files.
        tokenizer: Which tokenizer.
        text_key: Field or column with the text of a document.
        workers: Processes; 0 for one of each core.
        append_eod: End each document with the end-of-document token.
        skip_bad: Count records that cannot be used, rather than end at the first.
    """

    inputs: tuple[str, ...]
    output: Path
    tokenizer: TokenizerConfig
    text_key: str = "text"
    workers: int = 0
    append_eod: bool = True
    skip_bad: bool = False


@frozen(kw_only=True)
class BuildReport:
    """What was built.

    Attributes:
        documents: In the file; those without a token are not.
        tokens: In the file, ends of documents included.
        empty: Documents that had no text.
        bad: Records that were left out.
        examples: Of the first few of these: file, number and reason.
        input_bytes: Read.
        blocks: Of the input.
        blocks_reused: Of these, found done by an earlier build.
    """

    documents: int
    tokens: int
    empty: int
    bad: int
    examples: list[str] = field(factory=list)
    input_bytes: int
    blocks: int
    blocks_reused: int


@frozen(kw_only=True)
class _Block:
    """A part of an input file: bytes of lines, row groups of Parquet, or all of it."""

    path: str
    begin: int
    end: int
    kind: str
    size: int


def build_indexed_files(
    options: BuildOptions, *, progress: Callable[[int, int, int], None] = lambda *_: None
) -> BuildReport:
    """Tokenise the inputs into ``<output>.bin`` and ``<output>.idx``; return exact counts.

    What a block gave stays in ``<output>.parts`` until the end; the same call goes on from there,
    and one with other inputs, tokenizer or options starts anew.

    Args:
        options: What to build.
        progress: Called after each block with the bytes done, all bytes, and the tokens so far.

    Raises:
        DataError: If an input cannot be read, or, unless bad records are skipped, one is broken; names
            file, line and reason.
    """
    tokenizer = build_tokenizer(options.tokenizer)
    blocks = [b for path in expand(options.inputs, setting="--input") for b in _blocks(path)]
    parts = _parts_folder(options, fingerprint(tokenizer), blocks)
    total = sum(block.size for block in blocks)
    bad = BadRecords(setting="--on-error", skip=options.skip_bad)
    wanted = [i for i in range(len(blocks)) if not (parts / f"{i:06d}.json").is_file()]
    lines: dict[str, int] = {}
    done = tokens = empty = 0
    made = _tokenize(options, parts, [(i, blocks[i]) for i in wanted])
    for number, block in enumerate(blocks):
        if number in wanted:
            next(made)
        found = json.loads((parts / f"{number:06d}.json").read_text(encoding="utf-8"))
        before = lines.get(block.path, 0)
        try:
            for line, reason in found["bad"]:
                bad.note(block.path, before + line, reason)
        except DataError:
            made.close()
            raise
        lines[block.path] = before + found["records"]
        done, tokens, empty = done + block.size, tokens + found["tokens"], empty + found["empty"]
        progress(done, total, tokens)
    lengths = _join(options.output, parts, len(blocks), _dtype(tokenizer.vocab_size))
    report = BuildReport(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        empty=empty,
        bad=bad.found,
        examples=bad.examples,
        input_bytes=total,
        blocks=len(blocks),
        blocks_reused=len(blocks) - len(wanted),
    )
    shutil.rmtree(parts)
    return report


def _tokenize(
    options: BuildOptions, parts: Path, blocks: Sequence[tuple[int, _Block]]
) -> Generator[int, None, None]:
    """Make the parts of *blocks*, in order, in as many processes as asked for."""
    workers = min(options.workers or os.cpu_count() or 1, len(blocks))
    if workers <= 1:
        _start_worker(options, parts)
        for block in blocks:
            yield _make_part(block)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (options, parts)) as pool:
        yield from pool.imap(_make_part, blocks)


_worker: dict[str, Any] = {}


def _start_worker(options: BuildOptions, parts: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    tokenizer = build_tokenizer(options.tokenizer)
    _worker.update(options=options, parts=parts, tokenizer=tokenizer)


def _make_part(task: tuple[int, _Block]) -> int:
    """Write the tokens of one block and return its number; its ``.json``, renamed last, says that it is complete."""
    number, block = task
    options: BuildOptions = _worker["options"]
    tokenizer, parts = _worker["tokenizer"], _worker["parts"]
    bad: list[tuple[int, str]] = []
    records = 0
    with (parts / f"{number:06d}.bin").open("wb") as file:
        out = _Documents(file, tokenizer, [tokenizer.eod] if options.append_eod else [])
        for records, (text, problem) in enumerate(_texts(block, options.text_key), 1):
            if text is None:
                bad.append((records, str(problem)))
            elif block.kind == "text":
                out.write([i for piece in text_pieces(text) for i in tokenizer.encode(piece)])
            elif problem is None:
                out.add(text)
        out.flush()
    lengths, empty = out.lengths, out.empty
    np.save(parts / f"{number:06d}.npy", np.array(lengths, dtype=np.int32))
    found = {"records": records, "tokens": sum(lengths), "empty": empty, "bad": bad}
    unfinished = parts / f"{number:06d}.unfinished"
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.rename(parts / f"{number:06d}.json")
    return number


class _Documents:
    """Writes documents, many of which it tokenises at once."""

    def __init__(self, file: IO[bytes], tokenizer: Any, end: list[int]) -> None:
        self._file, self._end, self._dtype = file, end, _dtype(tokenizer.vocab_size)
        self._encode = getattr(tokenizer, "encode_batch", None) or (
            lambda texts: [tokenizer.encode(text) for text in texts]
        )
        self._waiting: list[str] = []
        self.lengths: list[int] = []
        self.empty = 0

    def add(self, text: str) -> None:
        self._waiting.append(text)
        if len(self._waiting) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        for ids in self._encode(self._waiting) if self._waiting else ():
            self.write(ids)
        self._waiting.clear()

    def write(self, ids: list[int]) -> None:
        if not ids:
            self.empty += 1
            return
        self._file.write(np.array([*ids, *self._end], dtype=self._dtype).tobytes())
        self.lengths.append(len(ids) + len(self._end))


def _texts(block: _Block, key: str) -> Iterator[tuple[str | None, str | None]]:
    """Yield text and problem of each record; a blank line has an empty text and is no document."""
    if block.kind == "text":
        try:
            with locations.open_bytes(block.path) as file:
                yield file.read().decode(), None
        except UnicodeDecodeError as error:
            yield None, f"not UTF-8 at byte {error.start}"
        return
    if block.kind == "parquet":
        yield from _column(block, key)
        return
    with open_text(block.path) as file:
        file.seek(block.begin)
        place = block.begin
        for line in file:
            place += len(line)
            yield _text_of_line(line, key)
            if place >= block.end >= 0:
                return


def _text_of_line(line: bytes, key: str) -> tuple[str | None, str | None]:
    if not line.strip():
        return "", "blank"
    record = parse_line(0, line)
    if record.value is None:
        return None, record.problem
    text = record.value.get(key)
    if isinstance(text, str):
        return text, None
    return None, f"field {key!r} is {'missing' if key not in record.value else 'not text'}"


def _column(block: _Block, key: str) -> Iterator[tuple[str | None, str | None]]:
    from pyarrow import parquet

    with parquet.ParquetFile(locations.arrow_file(block.path)) as file:
        if key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            yield None, f"column {key!r} is missing (columns: {names})"
            return
        for group in range(block.begin, block.end):
            for text in file.read_row_group(group, columns=[key]).column(key).to_pylist():
                good = isinstance(text, str)
                yield (text, None) if good else (None, f"field {key!r} is not text")


def _blocks(path: str) -> Iterator[_Block]:
    try:
        size = locations.stamp(path).size
    except OSError as error:
        raise unreadable(path, error) from error
    if not size:
        raise DataError(f"{path} is empty; name a file with text")
    if is_parquet(path):
        yield from _row_groups(path)
    elif path.endswith((".jsonl", ".json", ".ndjson")):
        yield from _lines(path, size)
    elif path.endswith(".jsonl.gz"):
        yield _Block(path=path, begin=0, end=-1, kind="lines", size=size)
    else:
        yield _Block(path=path, begin=0, end=size, kind="text", size=size)


def _lines(path: str, size: int) -> Iterator[_Block]:
    """Yield blocks of whole lines, some hundred a file, so that all processes end together."""
    block = max(_BLOCK, min(size >> 8, _LARGEST))
    with locations.open_bytes(path) as file:
        begin = 0
        while begin < size:
            file.seek(min(begin + block, size) - 1)
            file.readline()
            end = file.tell()
            yield _Block(path=path, begin=begin, end=end, kind="lines", size=end - begin)
            begin = end


def _row_groups(path: str) -> Iterator[_Block]:
    require("pyarrow", setting=f"{path}: Parquet")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.ParquetFile(locations.arrow_file(path)).metadata
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    if not metadata.num_rows:
        raise DataError(f"{path} is empty; name a file with records")
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        yield _Block(path=path, begin=group, end=group + 1, kind="parquet", size=size)


def _parts_folder(options: BuildOptions, tokenizer: str, blocks: Sequence[_Block]) -> Path:
    """Return the folder of parts; what another build left there is removed."""
    stamps = [locations.stamp(path) for path in dict.fromkeys(block.path for block in blocks)]
    depends_on = [
        tokenizer,
        options.text_key,
        options.append_eod,
        [attrs.asdict(block) for block in blocks],
        stamps,
    ]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    folder = options.output.with_name(options.output.name + ".parts")
    mark = folder / "build"
    try:
        if not mark.is_file() or mark.read_text(encoding="utf-8") != name:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(name, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"--output={options.output}: {folder} cannot be written ({error.strerror}); name"
            " another prefix"
        ) from error
    return folder


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def _join(output: Path, parts: Path, count: int, dtype: str) -> np.ndarray[Any, Any]:
    """Write ``.bin`` and ``.idx``; return the length of each document.

    Source of the format: megatron-core, ``datasets/indexed_dataset.py``.
    """
    with output.with_name(output.name + ".bin").open("wb") as file:
        for number in range(count):
            with (parts / f"{number:06d}.bin").open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 24)
    lengths = np.concatenate([np.load(parts / f"{n:06d}.npy") for n in range(count)])
    if not len(lengths):
        raise DataError(f"--output={output}: no input has any text; name others")
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    with output.with_name(output.name + ".idx").open("wb") as file:
        file.write(INDEX_HEADER + struct.pack("<QB", 1, _CODES[dtype]))
        file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes())
        file.write(np.concatenate([[0], ends[:-1]]).astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    return lengths
