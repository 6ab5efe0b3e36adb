# SPDX-License-Identifier: Apache-2.0
"""Where megatron-core 0.16 and 0.19 differ; the rest of the engine need not know which it has.

======================================  ===========================  ==============================
what                                    0.16.1                       0.19.2
======================================  ===========================  ==============================
``moe_utils.te_general_gemm``           undefined without TE         None without TE
spec of the expert layer                ``ModuleSpec``               ``functools.partial``
q and k norm of a plain attention       ``IdentityOp``               ``None``
``initialize_model_parallel``           ``create_all_gather_group``  ``gtp_remat_size``, and others
``GPTModel``                            silent                       logs that it is deprecated
======================================  ===========================  ==============================
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

_GPT_MODEL = "megatron.core.models.gpt.gpt_model"


@functools.cache
def prepare_megatron() -> None:
    """Import the parts of megatron-core the engine uses, and mend what its version got wrong.

    On import it warns of optional packages (Apex, Transformer Engine) that the engine does not
    need; those warnings are left out. Call it after the CPU adapter is installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        importlib.import_module(_GPT_MODEL)
        importlib.import_module("megatron.core.optimizer")
        importlib.import_module("megatron.core.distributed")
        importlib.import_module("megatron.core.pipeline_parallel")
    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16 tests this name in the router but forgets to define it where TE is missing.
        moe_utils.te_general_gemm = None
    logging.getLogger(_GPT_MODEL).addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )


def accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of *values* that are parameters of *function* in the installed version."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in known}


def is_moe_spec(mlp: Any) -> bool:
    """Return whether the ``mlp`` part of a layer spec builds a mixture-of-experts layer."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    target = mlp.func if isinstance(mlp, functools.partial) else getattr(mlp, "module", mlp)
    return isinstance(target, type) and issubclass(target, MoELayer)


def sharded_state_dict(chunk: nn.Module, metadata: Mapping[str, Any]) -> Any:
    """Return megatron-core's sharded state dict of one model chunk.

    Args:
        chunk: A ``MegatronModule``.
        metadata: What megatron-core's modules look up while they build it; the group of
            data-parallel replicas is filled in where it is missing or None.
    """
    from megatron.core import parallel_state

    full = dict(metadata)
    if full.get("dp_cp_group") is None:
        full["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return chunk.sharded_state_dict(metadata=full)
