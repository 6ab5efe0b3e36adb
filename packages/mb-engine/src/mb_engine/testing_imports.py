# SPDX-License-Identifier: Apache-2.0
"""Imported, for its effects alone, by the process that the ranks of tests are forked from.

Where there is no CUDA, megatron-core is adapted to the CPU and imported here once, which saves each
rank seconds. With CUDA nothing happens: there a rank imports for itself.
"""

from __future__ import annotations

import os

# Asking the driver itself would leave it in a state that forked processes cannot use.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

if not torch.cuda.is_available():
    import torch._dynamo  # what an optimizer imports when it is made

    from mb_engine.runtime import megatron_compat, megatron_cpu

    megatron_cpu.install()
    megatron_compat.prepare_megatron()
