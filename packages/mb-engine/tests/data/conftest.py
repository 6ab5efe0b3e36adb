# SPDX-License-Identifier: Apache-2.0
"""Lets the tests here share their modules."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
