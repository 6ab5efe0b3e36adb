# SPDX-License-Identifier: Apache-2.0
"""Configuration schema, exchange records and plugin lookup for Megatron training; torch-free."""

from mb_config.__about__ import __version__

__all__ = ["__version__"]
