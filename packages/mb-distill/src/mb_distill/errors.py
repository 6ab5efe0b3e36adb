# SPDX-License-Identifier: Apache-2.0
"""Errors of this package."""

from __future__ import annotations

from mb_config.errors import UserError


class DistillError(UserError, ValueError):
    """Arguments that do not fit each other; one line naming the argument, its value and the rule."""
