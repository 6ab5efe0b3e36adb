# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with data, its files and its tokenizer."""

from __future__ import annotations

from mb_engine.errors import EngineError


class DataError(EngineError):
    """Data that is missing, unreadable or too short; names the file and what to do."""
