# SPDX-License-Identifier: Apache-2.0
"""Files of this machine and of object stores, found and opened alike.

A path with a scheme, such as ``s3://bucket/key`` or ``gs://bucket/key``, is read by pyarrow's file
systems, which take credentials, region and endpoint (``AWS_ENDPOINT_URL``) where the tools of each
store have them.
"""

from __future__ import annotations

import functools
import glob
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mb_engine.data.errors import DataError
from mb_engine.data.tokenizer_libraries import require

if TYPE_CHECKING:
    from typing import IO

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_MAGIC = re.compile(r"[*?]")
_BUFFER = 1 << 20  # bytes asked of an object store at once


class Stamp(NamedTuple):
    """What tells one state of a file from another.

    Attributes:
        size: In bytes.
        mtime_ns: When it was last written.
    """

    size: int
    mtime_ns: int


def is_remote(path: str) -> bool:
    """Return whether *path* names its scheme, and is not a path of this machine."""
    return _SCHEME.match(path) is not None


def stamp(path: str) -> Stamp:
    """Return size and time of the file *path*.

    Raises:
        OSError: If it is missing, no file, or cannot be reached.
        DataError: If nothing reads that scheme.
    """
    if not is_remote(path):
        found = Path(path).stat()
        return Stamp(found.st_size, found.st_mtime_ns)
    system, inner = _system(path)
    info = system.get_file_info(inner)
    if info.size is None:
        raise FileNotFoundError(2, "no such file", path)
    return Stamp(info.size, info.mtime_ns or 0)


def is_file(path: str) -> bool:
    """Return whether *path* is a file.

    Raises:
        OSError: If an object store cannot be reached.
    """
    try:
        stamp(path)
    except FileNotFoundError:
        return False
    return is_remote(path) or Path(path).is_file()


def open_bytes(path: str) -> IO[bytes]:
    """Return the file *path*, opened for reading bytes anywhere in it.

    Raises:
        OSError: If it is missing or cannot be read.
        DataError: If nothing reads that scheme.
    """
    if not is_remote(path):
        return Path(path).open("rb")
    system, inner = _system(path)
    return io.BufferedReader(system.open_input_file(inner), _BUFFER)


def arrow_file(path: str) -> Any:
    """Return what pyarrow's readers open *path* from.

    Raises:
        OSError: If it is missing in an object store, or that cannot be reached.
        DataError: If nothing reads that scheme.
    """
    if not is_remote(path):
        return path
    system, inner = _system(path)
    return system.open_input_file(inner)


def matches(pattern: str) -> list[str] | None:
    """Return the files that match *pattern*, sorted; None if it is a path and not a pattern.

    ``*`` and ``?`` stay within one folder, ``**`` stands for folders of any depth.

    Raises:
        OSError: If an object store cannot be reached.
        DataError: If nothing reads that scheme.
    """
    if not is_remote(pattern):
        if not glob.has_magic(pattern) or Path(pattern).exists():
            return None
        return [m for m in sorted(glob.glob(pattern, recursive=True)) if Path(m).is_file()]  # noqa: PTH207
    magic = _MAGIC.search(pattern)
    if magic is None:
        return None
    from pyarrow import fs

    folder = pattern[: magic.start()].rpartition("/")[0]
    system, inner = _system(folder)
    found = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    wanted = _pattern(pattern[len(folder) + 1 :])
    names = [i.path[len(inner) :].lstrip("/") for i in found if i.type == fs.FileType.File]
    return [f"{folder}/{name}" for name in sorted(names) if wanted.fullmatch(name)]


def _pattern(text: str) -> re.Pattern[str]:
    """Return the expression for a shell pattern in which only ``**`` crosses folders."""
    escaped = re.escape(text).replace(r"\*\*/", "(?:[^/]+/)*")
    return re.compile(escaped.replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))


def _system(path: str) -> tuple[Any, str]:
    """Return pyarrow's file system for *path*, and what the path is called there."""
    require("pyarrow", setting=path)
    import pyarrow as pa

    scheme, _, rest = path.partition("://")
    bucket, slash, key = rest.partition("/")
    try:
        system, inner = _made(f"{scheme}://{bucket or '/'}")
    except (pa.ArrowException, NotImplementedError) as error:
        raise DataError(
            f"{path}: {str(error).splitlines()[0]}; give a path of this machine, or a URL that"
            " begins with s3://, gs://, abfss://, hdfs:// or file://"
        ) from error
    return system, f"{inner.rstrip('/')}{slash}{key}"


@functools.lru_cache(maxsize=64)
def _made(root: str) -> tuple[Any, str]:
    """Return the file system of a bucket, which keeps its connections, and the bucket's name."""
    from pyarrow import fs

    system, inner = fs.FileSystem.from_uri(root)
    return system, inner
