# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other formats: taken over from them, and given out in them."""
