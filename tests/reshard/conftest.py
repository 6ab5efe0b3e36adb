# SPDX-License-Identifier: Apache-2.0
"""The tests of this folder share a module of it, which ranks import by its name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
