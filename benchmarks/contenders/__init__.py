# SPDX-License-Identifier: Apache-2.0
"""Three ways to train one and the same small Llama, each behind the same two methods."""

from __future__ import annotations
