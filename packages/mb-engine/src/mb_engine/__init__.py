# SPDX-License-Identifier: Apache-2.0
"""The training engine on megatron-core: CPU over gloo and CUDA over NCCL, one code path."""

from mb_engine.__about__ import __version__

__all__ = ["__version__"]
