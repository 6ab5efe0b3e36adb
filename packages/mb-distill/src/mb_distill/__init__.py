# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation losses, exact and memory-lean."""

from mb_distill.__about__ import __version__
from mb_distill.errors import DistillError
from mb_distill.fused import fused_linear_kl, fused_linear_kl_terms
from mb_distill.interfaces import DistillLoss
from mb_distill.losses import forward_kl, forward_kl_terms

__all__ = [
    "DistillError",
    "DistillLoss",
    "__version__",
    "forward_kl",
    "forward_kl_terms",
    "fused_linear_kl",
    "fused_linear_kl_terms",
]
