# SPDX-License-Identifier: Apache-2.0
"""Errors of this package."""

from __future__ import annotations

from mb_config.errors import UserError


class PeftError(UserError, ValueError):
    """Adapters that cannot be put in, merged, saved or loaded as asked; one line on what to do."""
