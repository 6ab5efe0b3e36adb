# SPDX-License-Identifier: Apache-2.0
"""Where megatron-core 0.16 and 0.19 differ; the rest of the engine need not know which it has.

======================================  ===========================  ==============================
what                                    0.16.1                       0.19.2
======================================  ===========================  ==============================
``moe_utils.te_general_gemm``           undefined without TE         None without TE
recomputed norms without TE             NameError                    NameError
latent attention without TE             TypeError                    TypeError
norm of queries that are not compressed none                         before their projection
Megatron-FSDP with TP, without TE       TypeError                    goes by class names
``fp32_residual_connection``            of the embedding alone       of every layer
spec of the expert layer                ``ModuleSpec``               ``functools.partial``
spec of the dense MLP                   ``ModuleSpec``               ``functools.partial``
q and k norm of a plain attention       ``IdentityOp``               ``None``
``initialize_model_parallel``           ``create_all_gather_group``  ``gtp_remat_size``, and others
``GPTModel``                            silent                       logs that it is deprecated
``moe.ops.paged_stash``                 is not there                imports triton without asking
``cuda_graph_scope``                    None means the old ``full``   is ``cuda_graph_modules``
======================================  ===========================  ==============================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import torch

from mb_engine.errors import EngineError
from mb_engine.runtime import megatron_cpu

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

_GPT_MODEL = "megatron.core.models.gpt.gpt_model"
_TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"
_GROUP_OR_DEFAULT = "get_tensor_model_parallel_group_if_none"


@functools.cache
def prepare_megatron() -> None:
    """Import the parts of megatron-core the engine uses, and mend what its version got wrong.

    On import it warns of optional packages (Apex, Transformer Engine) that the engine does not
    need; those warnings are left out. Call it after the CPU adapter is installed.
    """
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_TRITON_KERNELS, _without_triton())
    with warnings.catch_warnings(), megatron_cpu.eager_import():
        warnings.simplefilter("ignore")
        moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        importlib.import_module(_GPT_MODEL)
        importlib.import_module("megatron.core.optimizer")
        importlib.import_module("megatron.core.distributed")
        importlib.import_module("megatron.core.pipeline_parallel")
    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16 tests this name in the router but forgets to define it where TE is missing.
        moe_utils.te_general_gemm = None
    _do_without_te()
    _keep_residuals_in_float32()
    _latent_attention_without_te()
    _uncompressed_queries_without_norm()
    _replace_what_warns_at_each_call()
    logging.getLogger(_GPT_MODEL).addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )


def _do_without_te() -> None:
    """Keep recomputed modules and Megatron-FSDP from names that Transformer Engine would bring.

    Both versions look up its FP8 state for ``recompute_modules`` such as ``layernorm`` unless told
    ``fp8=None``, which most callers forget. 0.16's FSDP asks what is an instance of its linear.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    adapter: Any = importlib.import_module("megatron.core.distributed.fsdp.mcore_fsdp_adapter")
    if not isinstance(getattr(adapter, "TELinear", None), type):
        adapter.TELinear = ()  # no module is one; a mock, which it is there, cannot be asked
    checkpoint = random.CheckpointWithoutOutput
    if random.HAVE_TE or getattr(checkpoint.__init__, "without_te", False):
        return
    init = checkpoint.__init__

    @functools.wraps(init)
    def without_fp8(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.fp8 = False

    without_fp8.without_te = True  # type: ignore[attr-defined]
    checkpoint.__init__ = without_fp8


def _keep_residuals_in_float32() -> None:
    """Let ``fp32_residual_connection`` have its effect in 0.16, as it has in 0.19.

    There a layer's sum takes the dtype of its branch. So the residual stream has 16 bits after the
    first layer, and a pipeline stage sends 16 bits where the next one receives 32.
    """
    fused: Any = importlib.import_module("megatron.core.fusions.fused_bias_dropout")
    add = fused._bias_dropout_add_func  # noqa: SLF001
    branch, residual = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    if add((branch, None), residual, 0.0, False).dtype == residual.dtype:
        return

    def add_in_dtype_of_residual(
        x_with_bias: tuple[Any, Any], residual: Any, prob: float, training: bool
    ) -> Any:
        x, bias = x_with_bias
        if x.dtype != residual.dtype:
            x = x.to(residual.dtype)
            bias = None if bias is None else bias.to(residual.dtype)
        return add((x, bias), residual, prob, training)

    fused._bias_dropout_add_func = add_in_dtype_of_residual  # noqa: SLF001


def _latent_attention_without_te() -> None:
    """Let latent attention do without Transformer Engine and without CUDA.

    It takes Transformer Engine to be there although its own import of it failed, and computes
    stretched rotary positions on the CUDA device whatever the model is on.
    """
    latent: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    if not isinstance(latent.TELinear, type):
        latent.HAVE_TE = False
    yarn = latent.YarnRotaryEmbedding
    if not torch.cuda.is_available() and not isinstance(yarn, functools.partial):
        latent.YarnRotaryEmbedding = functools.partial(yarn, use_cpu_initialization=True)


def _uncompressed_queries_without_norm() -> None:
    """Leave latent queries that are not compressed without a norm of their own, as in 0.16.

    0.19 puts a second norm of the hidden state before their projection, with Transformer Engine, or
    fails without. DeepSeek-V2-Lite, the model of that kind, has none (arXiv:2405.04434, appendix B).
    """
    path = "megatron.core.transformer.mla_qk_norm_config"
    if importlib.util.find_spec(path) is None:
        return
    resolver: Any = importlib.import_module(path).QKNormConfigResolver
    chosen = resolver._mla_fused_linear_or_default  # noqa: SLF001

    def choose(self: Any, module_spec: Any, module_name: str) -> Any:
        if module_name != "linear_q_proj":
            return chosen(self, module_spec, module_name)
        fused = self._is_fused_norm_linear(module_spec)
        return self.linear_impl if fused or module_spec is None else module_spec

    resolver._mla_fused_linear_or_default = choose  # noqa: SLF001


def _without_triton() -> types.ModuleType:
    """Return what the module of triton kernels is where triton is missing, as on a CPU.

    0.19 imports those kernels with its pipeline schedules, for a way to keep activations of experts
    that only CUDA has. 0.16 does not have the module and never looks for it.
    """
    module = types.ModuleType(_TRITON_KERNELS)
    kernels: Any = module
    kernels.GLOBAL_BLOCK_SIZE = 1024
    kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = _MissingKernel()
    return module


class _MissingKernel:
    """A triton kernel that cannot be launched."""

    def __getitem__(self, _grid: Any) -> Any:
        raise EngineError(
            "model.megatron.moe_paged_stash: its kernels need triton, which is not installed;"
            " leave it out, or pip install triton on a machine with CUDA"
        )


def _replace_what_warns_at_each_call() -> None:
    """Rebind what megatron-core's modules imported by name and what warns in every layer.

    Newer torch renamed two collectives, and megatron-core deprecates a default that its own linears
    rely on. A warning costs time at every call, even where it is filtered out.
    """
    from megatron.core import utils

    replacements: dict[str, tuple[Any, Any]] = {
        _GROUP_OR_DEFAULT: (getattr(utils, _GROUP_OR_DEFAULT), _group_or_default)
    }
    renamed = {
        "dist_all_gather_func": ("all_gather_into_tensor", "all_gather_single"),
        "dist_reduce_scatter_func": ("reduce_scatter_tensor", "reduce_scatter_single"),
    }
    for attribute, (old, new) in renamed.items():
        if hasattr(torch.distributed, new):
            collectives = getattr(torch.distributed, old), getattr(torch.distributed, new)
            replacements[attribute] = collectives
    modules = [m for name, m in sys.modules.items() if name.startswith("megatron.core.")]
    for attribute, (was, becomes) in replacements.items():
        for module in modules:
            if getattr(module, attribute, None) is was:
                setattr(module, attribute, becomes)


def _group_or_default(
    tp_group: Any, is_expert: bool = False, check_initialized: bool = True
) -> Any:
    """Return *tp_group*, or where it is None the job's tensor-parallel group, if there is one."""
    if tp_group is not None or not torch.distributed.is_initialized():
        return tp_group
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return None
    get = parallel_state.get_tensor_model_parallel_group
    if is_expert:
        get = parallel_state.get_expert_tensor_parallel_group
    return get(check_initialized=check_initialized)


def is_moe_spec(mlp: Any) -> bool:
    """Return whether the ``mlp`` part of a layer spec builds a mixture-of-experts layer."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    target = mlp.func if isinstance(mlp, functools.partial) else getattr(mlp, "module", mlp)
    return isinstance(target, type) and issubclass(target, MoELayer)


def moe_submodules(mlp: Any) -> Any:
    """Return the submodules of a spec for which :func:`is_moe_spec` holds."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def expert_linears(mlp: Any) -> list[Any]:
    """Return where a spec for which :func:`is_moe_spec` holds names its experts' linears."""
    parts = moe_submodules(mlp)
    specs = (parts.experts, parts.shared_experts)
    return [
        s.keywords["submodules"] if isinstance(s, functools.partial) else s.submodules
        for s in specs
    ]


def dense_mlp_spec(mlp_class: type, spec: Any) -> Any:
    """Return what makes a transformer layer build its dense MLP as *mlp_class*.

    Args:
        mlp_class: A subclass of megatron-core's ``MLP`` whose submodules have defaults.
        spec: The ``mlp`` part of the layer spec that is to be replaced.
    """
    if isinstance(spec, functools.partial):
        return functools.partial(mlp_class.as_mlp_submodule, submodules=None)  # type: ignore[attr-defined]
    # 0.16 takes a bare class as it is, but warns of a spec whose module is not its own.
    return mlp_class


def cuda_graph_fields(scope: Sequence[str] | None, *, known: Collection[str]) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` that say what CUDA graphs capture.

    Args:
        scope: The configuration's ``cuda_graph_scope``; None or empty means whole layers.
        known: Names of the fields that the installed version has.
    """
    parts = list(scope or ())
    if "cuda_graph_modules" not in known:
        return {"cuda_graph_scope": parts}
    fields: dict[str, Any] = {"cuda_graph_modules": [p for p in parts if p != "full_iteration"]}
    if "full_iteration" in parts:
        fields["cuda_graph_impl"] = "full_iteration"
    return fields


def cuda_graph_kind(config: Any) -> str:
    """Return ``none``, ``local``, ``transformer_engine`` or ``full_iteration``.

    Args:
        config: A ``TransformerConfig`` made from :func:`cuda_graph_fields`.
    """
    kind = str(getattr(config, "cuda_graph_impl", "none") or "none")
    scope = getattr(config, "cuda_graph_scope", None) or []
    names = {getattr(part, "name", part) for part in scope}
    return "full_iteration" if kind == "local" and "full_iteration" in names else kind


@contextlib.contextmanager
def without_process_group() -> Iterator[None]:
    """Let megatron-core take this process for the only one.

    Its blended data sets ask for the rank whether or not there is a process group, and with one they
    have rank 0 build the index while all others wait, which ends where ranks are let in one by one.
    """
    distributed: Any = torch.distributed
    kept = distributed.is_initialized, distributed.get_rank
    distributed.is_initialized, distributed.get_rank = (lambda: False), (lambda *_: 0)
    try:
        yield
    finally:
        distributed.is_initialized, distributed.get_rank = kept
