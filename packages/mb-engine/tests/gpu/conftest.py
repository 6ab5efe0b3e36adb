# SPDX-License-Identifier: Apache-2.0
"""Let the tests of this folder import what they share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
