# SPDX-License-Identifier: Apache-2.0
"""From what the user asked for to a configuration with nothing left open."""

from mb_config.resolve.run import finalize

__all__ = ["finalize"]
