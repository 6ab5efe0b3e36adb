# SPDX-License-Identifier: Apache-2.0
"""What a user of the sinks can put right."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mb_config.errors import UserError

if TYPE_CHECKING:
    from os import PathLike


class LoggingError(UserError):
    """A sink that cannot be made, or a metrics file that cannot be read."""


def require(module: str, *, extra: str, sink: str) -> Any:
    """Import *module* for *sink*.

    Raises:
        LoggingError: If it is not installed; names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise LoggingError(
            f"the {sink} sink needs {module.partition('.')[0]}, which cannot be imported"
            f' ({error}); pip install "mb-logging[{extra}]"'
        ) from error


def make_folder(folder: str | PathLike[str], *, sink: str) -> Path:
    """Return *folder*, made with its parents where it is not there.

    Raises:
        LoggingError: If it cannot be made.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoggingError(
            f"{path}: the {sink} sink cannot make this folder ({error.strerror});"
            " give one that can be written"
        ) from error
    return path
