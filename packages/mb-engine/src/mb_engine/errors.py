# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in a run that its user can put right."""

from __future__ import annotations

from mb_config.errors import UserError


class EngineError(UserError, RuntimeError):
    """A run that cannot start or go on."""


class NumericsError(EngineError):
    """The loss or a gradient is nan or infinite; no checkpoint of this state is saved."""


class CheckpointMismatchError(EngineError):
    """A checkpoint does not fit the run that loads it."""
