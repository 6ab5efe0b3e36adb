# SPDX-License-Identifier: Apache-2.0
"""Configuration schema, exchange records and plugin lookup for Megatron training; torch-free."""

from mb_config import plugins, sections
from mb_config.__about__ import __version__
from mb_config.container import ConfigContainer, json_schema
from mb_config.errors import ConfigError, PluginError, UserError, Violation
from mb_config.precisions import precision_names, register_precision
from mb_config.sections import *  # noqa: F403

__all__ = [
    "ConfigContainer",
    "ConfigError",
    "PluginError",
    "UserError",
    "Violation",
    "__version__",
    "json_schema",
    "plugins",
    "precision_names",
    "register_precision",
]
__all__ += sections.__all__
