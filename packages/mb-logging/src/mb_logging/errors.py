# SPDX-License-Identifier: Apache-2.0
"""What a user of the sinks can put right."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mb_config.errors import UserError


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
            f"the {sink} sink needs {module.partition('.')[0]}, which is not installed;"
            f' pip install "mb-logging[{extra}]"'
        ) from error
