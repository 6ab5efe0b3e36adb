# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation losses, exact and memory-lean."""

from mb_distill.__about__ import __version__

__all__ = ["__version__"]
