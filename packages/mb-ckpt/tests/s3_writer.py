# SPDX-License-Identifier: Apache-2.0
"""Saves for ever to the URL it is given, until it is killed; run by test_object_stores.py."""

from __future__ import annotations

import sys

import torch
from mb_ckpt import CheckpointStore

with CheckpointStore(sys.argv[1], keep_last=2) as store:
    first = (store.steps() or [0])[-1] + 1
    for step in range(first, first + 1000):
        store.save(step, {"w": torch.full((300_000,), float(step))}).result()
        if step == first:
            print("saved", flush=True)
