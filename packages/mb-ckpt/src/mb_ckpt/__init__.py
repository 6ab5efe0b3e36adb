# SPDX-License-Identifier: Apache-2.0
"""Distributed, resharding, atomically committed checkpoints on tensorstore."""

from mb_ckpt.__about__ import __version__

__all__ = ["__version__"]
