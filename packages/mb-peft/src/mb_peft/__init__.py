# SPDX-License-Identifier: Apache-2.0
"""LoRA and other adapters for torch and parallel linears."""

from mb_peft.__about__ import __version__

__all__ = ["__version__"]
