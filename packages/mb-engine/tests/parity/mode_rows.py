# SPDX-License-Identifier: Apache-2.0
"""The mode table as data: what is compared with one rank, and how close it must come.

Every row trains the same weights on the same global batches as its reference: one rank with the
row's ``shared`` overrides in the row's precision. Where the rows of one table differ from one
another is written here, and nowhere else.
"""

from __future__ import annotations

from attrs import field, frozen

STEPS = 20
GLOBAL_BATCH = 8

BASE = (
    "model.num_layers=4",
    f"train.global_batch_size={GLOBAL_BATCH}",
    f"train.train_iters={STEPS}",
    "optimizer.lr=1e-3",
    # Adam's update is as large as its learning rate wherever a gradient is not quite zero, which
    # makes steps out of rounding noise; a larger eps keeps that out of the comparison.
    "optimizer.adam_eps=1e-5",
    "scheduler.lr_decay_style=constant",
)


@frozen(kw_only=True)
class Bound:
    """How far a row may be from what it is compared with.

    Attributes:
        loss: Largest absolute difference of any step's loss.
        grad_norm: Largest relative difference of a step's gradient norm before clipping.
        parameters: Largest relative difference of the parameters' norm after the last step.
        reason: Why no less.
        norm_steps: Over how many first steps gradient norms are compared.
    """

    loss: float
    grad_norm: float
    parameters: float
    reason: str
    norm_steps: int = STEPS


FP32 = Bound(
    loss=1e-5,
    grad_norm=1e-3,
    parameters=1e-5,
    reason="order of additions: a few float32 roundings (6e-8 relative) a step at losses near 5,"
    " carried on by Adam; gradient norms move by what the weights moved, divided by their size",
)
LATER = (
    "; after 8 steps the weights have moved apart by more than gradient norms, which then swing"
    " by half, can be compared at"
)
BF16 = Bound(
    loss=1e-2,
    grad_norm=2e-2,
    parameters=5e-4,
    reason="activations keep 8 bits (4e-3 relative); partial sums are rounded before they are"
    " added over ranks" + LATER,
    norm_steps=8,
)
FP16 = Bound(
    loss=2e-3,
    grad_norm=1e-2,
    parameters=1e-4,
    reason="activations keep 11 bits (5e-4 relative); partial sums are rounded before they are"
    " added over ranks" + LATER,
    norm_steps=8,
)
SAME = Bound(
    loss=0.0, grad_norm=0.0, parameters=0.0, reason="the same operations in the same order"
)

PRECISIONS = {
    "fp32": (),
    "bf16": ("mixed_precision=bf16_mixed",),
    "fp16": ("mixed_precision=fp16_mixed", "optimizer.initial_loss_scale=64"),
}
OWN_BOUND = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
AGAINST_FP32 = {
    "bf16": Bound(
        loss=2e-2,
        grad_norm=4e-2,
        parameters=1e-3,
        reason="what one rank's own bf16 run is away from float32, and the bound of the modes",
        norm_steps=8,
    ),
    "fp16": Bound(
        loss=4e-3,
        grad_norm=2e-2,
        parameters=2e-4,
        reason="what one rank's own fp16 run is away from float32, and the bound of the modes",
        norm_steps=8,
    ),
}


@frozen(kw_only=True)
class Row:
    """One mode.

    Attributes:
        name: Unique, as people write it.
        kind: Heading in the report.
        ranks: Processes.
        mode: Overrides of this row alone.
        shared: Overrides of the reference as well.
        precision: Key of :data:`PRECISIONS`, of the reference as well.
        bound: Against the reference; that of the precision if None.
        short: Whether the normal test session runs it.
        learns: By how much the loss must fall over the run, so that there is something to compare.
        packed: Whether every micro-batch is a row of three samples that must not see each other.
        skips: Whether some steps must overflow and be skipped; such a run has no like in float32.
    """

    name: str
    kind: str
    ranks: int
    mode: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    precision: str = "fp32"
    _bound: Bound | None = field(default=None, alias="bound")
    short: bool = False
    learns: float = 0.3
    packed: bool = False
    skips: bool = False

    @property
    def bound(self) -> Bound:
        return self._bound or OWN_BOUND[self.precision]

    @property
    def overrides(self) -> tuple[str, ...]:
        """All overrides over the tiny configuration."""
        return (*self.reference, *self.mode)

    @property
    def reference(self) -> tuple[str, ...]:
        """Overrides of the run on one rank that this row is compared with."""
        return (*BASE, *PRECISIONS[self.precision], *self.shared)

    @property
    def wider_bound(self) -> Bound | None:
        """Against one rank in float32, None where that is no reference."""
        return None if self.skips else AGAINST_FP32.get(self.precision)

    @property
    def reference_in_fp32(self) -> tuple[str, ...]:
        """Overrides of the float32 run on one rank."""
        return (*BASE, *self.shared)


TP2 = ("model.tensor_model_parallel_size=2",)
SP = ("model.sequence_parallel=true",)
PP2 = ("model.pipeline_model_parallel_size=2",)
PP4 = ("model.pipeline_model_parallel_size=4",)
VPP2 = ("model.virtual_pipeline_model_parallel_size=2",)
CP2 = ("model.context_parallel_size=2",)
CP4 = ("model.context_parallel_size=4",)
RING = ("model.cp_comm_type=p2p",)
A2A = ("model.cp_comm_type=a2a",)
EP2 = ("model.expert_model_parallel_size=2",)
ALLTOALL = ("model.moe_token_dispatcher_type=alltoall",)
ALLGATHER = ("model.moe_token_dispatcher_type=allgather",)
DISTRIBUTED = ("optimizer.use_distributed_optimizer=true",)
BUCKETS = ("ddp.bucket_size=4096",)
FSDP = ("ddp.use_megatron_fsdp=true",)
GRADS = ("ddp.overlap_grad_reduce=true", *BUCKETS)
OVERLAP = (*GRADS, "ddp.overlap_param_gather=true")

TIED = ("model.share_embeddings_and_output_weights=true",)
BIASES = ("model.normalization=LayerNorm", "model.add_bias_linear=true")
WINDOW = ("model.window_size=[5, 0]",)
PACKED = ("train.micro_batch_size=1",)
FOUR_GROUPS = ("model.num_query_groups=4",)
DROPOUT = ("model.hidden_dropout=0.2",)
EIGHT = ("model.num_layers=8",)
MOE = ("model.num_moe_experts=4", "model.moe_layer_freq=[0, 1, 0, 1]")
BALANCED = (*MOE, "model.moe_aux_loss_coeff=0.05", "model.moe_z_loss_coeff=0.01")
SHARED_EXPERT = (*BALANCED, "model.moe_shared_expert_intermediate_size=64")
# Scales that overflow for some steps, which then are skipped, on all ranks alike.
OVERFLOW = ("optimizer.initial_loss_scale=16384", "optimizer.hysteresis=1")
AHEAD = ("model.mtp_num_layers=1",)
LATENT = (
    "model.num_query_groups=null",
    "model.multi_latent_attention=true",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=16",
)
RAMP = (f"train.rampup_batch_size=[4, 4, {4 * 6}]",)

UNIFORM = (
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
)
BLOCK = (
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=block",
    "recompute.recompute_num_layers=1",
)
SELECTIVE = ("recompute.recompute_granularity=selective",)
MODULES = (*SELECTIVE, "recompute.recompute_modules=[core_attn, mlp, layernorm]")


def row(kind: str, name: str, ranks: int, *mode: tuple[str, ...], **rest: object) -> Row:
    """Return a row whose overrides are all of *mode*, one after the other."""
    return Row(name=name, kind=kind, ranks=ranks, mode=sum(mode, ()), **rest)


TABLE: tuple[Row, ...] = (
    # Tensor and sequence parallelism
    row("Tensor", "TP2", 2, TP2),
    row("Tensor", "TP2 + SP", 2, TP2, SP, short=True),
    row("Tensor", "TP2 + SP, LayerNorm and biases", 2, TP2, SP, shared=BIASES, short=True),
    row("Tensor", "TP2, dropout", 2, TP2, shared=DROPOUT, short=True),
    row("Tensor", "TP2, tied embeddings", 2, TP2, shared=TIED),
    row(
        "Tensor",
        "TP4 + SP",
        4,
        ("model.tensor_model_parallel_size=4",),
        SP,
        shared=("model.num_query_groups=4",),
    ),
    # Data parallelism
    row("Data", "DP2", 2),
    row("Data", "DP2, overlapped reduction", 2, GRADS),
    row("Data", "DP2, distributed optimizer", 2, DISTRIBUTED),
    row("Data", "DP2, distributed optimizer, overlap", 2, DISTRIBUTED, OVERLAP, short=True),
    row(
        "Data",
        "DP4, two distributed optimizers",
        4,
        DISTRIBUTED,
        ("ddp.num_distributed_optimizer_instances=2",),
    ),
    row("Data", "DP2, batch ramp-up", 2, shared=RAMP),
    row("Data", "DP2, tied embeddings, distributed optimizer", 2, DISTRIBUTED, shared=TIED),
    # Pipelines
    row("Pipeline", "PP2", 2, PP2),
    row("Pipeline", "PP4", 4, PP4),
    row("Pipeline", "PP2, tied embeddings", 2, PP2, shared=TIED, short=True),
    row("Pipeline", "PP2 x VPP2", 2, PP2, VPP2, short=True),
    row("Pipeline", "PP4 x VPP2", 4, PP4, VPP2, shared=EIGHT),
    row("Pipeline", "PP2 x VPP2, tied embeddings", 2, PP2, VPP2, shared=TIED),
    row(
        "Pipeline",
        "PP2, uneven: 1 and 3 layers",
        2,
        PP2,
        ("model.num_layers_in_first_pipeline_stage=1",),
    ),
    row("Pipeline", "PP2, LayerNorm and biases", 2, PP2, shared=BIASES),
    row("Pipeline", "PP2, batch ramp-up", 2, PP2, shared=RAMP),
    row(
        "Pipeline",
        "PP2, layout Ettt|tL",
        2,
        PP2,
        ("model.pipeline_model_parallel_layout=Ettt|tL",),
    ),
    row(
        "Pipeline",
        "PP2 x VPP2, layout Et|t|t|tL",
        2,
        PP2,
        ("model.pipeline_model_parallel_layout=Et|t|t|tL",),
    ),
    # Prediction ahead (MTP) and latent attention (MLA)
    row("Models", "MTP, PP2", 2, PP2, shared=AHEAD),
    row("Models", "MTP, TP2 + SP", 2, TP2, SP, shared=AHEAD),
    row("Models", "MTP, DP2, distributed optimizer", 2, DISTRIBUTED, shared=AHEAD),
    row("Models", "MLA, TP2 + SP", 2, TP2, SP, shared=LATENT),
    row("Models", "MLA, PP2", 2, PP2, shared=LATENT, short=True),
    row("Models", "MLA, CP2", 2, CP2, shared=LATENT),
    # Context parallelism
    row("Context", "CP2, all_gather", 2, CP2, ("model.cp_comm_type=all_gather",), short=True),
    row("Context", "CP4, all_gather", 4, CP4, ("model.cp_comm_type=all_gather",)),
    row("Context", "CP2, ring", 2, CP2, RING, short=True),
    row("Context", "CP4, ring", 4, CP4, RING),
    row("Context", "CP2, a2a", 2, CP2, A2A, shared=FOUR_GROUPS),
    row("Context", "CP2, all_gather, window", 2, CP2, shared=WINDOW),
    row("Context", "CP2, a2a, window", 2, CP2, A2A, shared=(*FOUR_GROUPS, *WINDOW)),
    # Packed samples
    row("Packed", "TP2 + SP", 2, TP2, SP, shared=PACKED, packed=True),
    row("Packed", "PP2", 2, PP2, shared=PACKED, packed=True),
    row(
        "Packed",
        "CP2, all_gather",
        2,
        CP2,
        ("model.cp_comm_type=all_gather",),
        shared=PACKED,
        packed=True,
        short=True,
    ),
    row("Packed", "CP2, ring", 2, CP2, RING, shared=PACKED, packed=True),
    row("Packed", "DP2, distributed optimizer", 2, DISTRIBUTED, shared=PACKED, packed=True),
    row("Packed", "TP2 + SP x CP2", 4, TP2, SP, CP2, RING, shared=PACKED, packed=True),
    row("Packed", "PP2 x CP2", 4, PP2, CP2, shared=PACKED, packed=True),
    row("Packed", "PP2, full recomputation", 2, PP2, UNIFORM, shared=PACKED, packed=True),
    # Experts
    row("Experts", "EP2, allgather", 2, EP2, ALLGATHER, shared=MOE),
    row("Experts", "EP2, alltoall", 2, EP2, ALLTOALL, shared=MOE),
    row("Experts", "EP2, alltoall, aux and z loss", 2, EP2, ALLTOALL, shared=BALANCED),
    row(
        "Experts",
        "EP2, alltoall, aux and z loss, shared expert",
        2,
        EP2,
        ALLTOALL,
        shared=SHARED_EXPERT,
        short=True,
    ),
    row("Experts", "EP2, distributed optimizer", 2, EP2, ALLTOALL, DISTRIBUTED, shared=MOE),
    row("Experts", "DP2, aux and z loss, shared expert", 2, shared=SHARED_EXPERT),
    row("Experts", "TP2 + SP, aux and z loss, shared expert", 2, TP2, SP, shared=SHARED_EXPERT),
    row("Experts", "PP2, aux and z loss, shared expert", 2, PP2, shared=SHARED_EXPERT),
    row("Experts", "EP2 x TP2 + SP", 4, EP2, TP2, SP, ALLTOALL, shared=MOE),
    row(
        "Experts",
        "EP2 x TP2 + SP, expert TP 1",
        4,
        EP2,
        TP2,
        SP,
        ALLTOALL,
        ("model.expert_tensor_parallel_size=1",),
        shared=MOE,
    ),
    row("Experts", "EP2 x PP2", 4, EP2, PP2, ALLTOALL, shared=MOE),
    row(
        "Experts",
        "EP2 x PP2, aux and z loss, shared expert",
        4,
        EP2,
        PP2,
        ALLTOALL,
        shared=SHARED_EXPERT,
    ),
    # Products
    row("Products", "TP2 x PP2", 4, TP2, PP2, short=True),
    row("Products", "TP2 + SP x PP2 x VPP2, tied embeddings", 4, TP2, SP, PP2, VPP2, shared=TIED),
    row("Products", "TP2 x CP2", 4, TP2, SP, CP2),
    row("Products", "PP2 x CP2", 4, PP2, CP2, short=True),
    row("Products", "TP2 x DP2, distributed optimizer, overlap", 4, TP2, SP, DISTRIBUTED, OVERLAP),
    row("Products", "PP2 x DP2, distributed optimizer, overlap", 4, PP2, DISTRIBUTED, OVERLAP),
    row(
        "Products",
        "PP2 x VPP2 x DP2, distributed optimizer, overlap",
        4,
        PP2,
        VPP2,
        DISTRIBUTED,
        OVERLAP,
    ),
    row("Products", "CP2 x DP2, distributed optimizer", 4, CP2, DISTRIBUTED),
    # Megatron-FSDP
    row("Megatron-FSDP", "DP2, optim", 2, FSDP, ("ddp.data_parallel_sharding_strategy=optim",)),
    row(
        "Megatron-FSDP",
        "DP2, optim_grads",
        2,
        FSDP,
        ("ddp.data_parallel_sharding_strategy=optim_grads",),
    ),
    row("Megatron-FSDP", "DP2, optim_grads_params", 2, FSDP, short=True),
    row("Megatron-FSDP", "DP2, tied embeddings", 2, FSDP, shared=TIED),
    row("Megatron-FSDP", "DP2, full recomputation", 2, FSDP, UNIFORM),
    row("Megatron-FSDP", "CP2", 2, FSDP, CP2),
    row("Megatron-FSDP", "DP2 x TP2 + SP", 4, FSDP, TP2, SP),
    row("Megatron-FSDP", "DP4 x EP2", 4, FSDP, EP2, ALLTOALL, shared=MOE),
    row("Megatron-FSDP", "bf16 DP2, optim_grads_params", 2, FSDP, precision="bf16"),
    # Recomputation
    row("Recomputation", "1 rank, full uniform", 1, UNIFORM, bound=SAME, short=True),
    row("Recomputation", "1 rank, full block", 1, BLOCK, bound=SAME),
    row("Recomputation", "1 rank, selective attention", 1, SELECTIVE),
    row("Recomputation", "1 rank, selective modules", 1, MODULES),
    row(
        "Recomputation",
        "1 rank, full uniform, dropout",
        1,
        UNIFORM,
        bound=SAME,
        shared=DROPOUT,
        learns=0.3,
    ),
    row("Recomputation", "PP2, full uniform", 2, PP2, UNIFORM, short=True),
    row("Recomputation", "PP2, full block", 2, PP2, BLOCK),
    row("Recomputation", "PP2, selective modules", 2, PP2, MODULES),
    row("Recomputation", "TP2 + SP, full uniform", 2, TP2, SP, UNIFORM),
    # 16 bits
    row("Precision", "bf16 1 rank", 1, precision="bf16", bound=SAME),
    row(
        "Precision", "bf16 DP2, distributed optimizer", 2, DISTRIBUTED, precision="bf16", short=True
    ),
    row("Precision", "bf16 TP2 + SP", 2, TP2, SP, precision="bf16"),
    row("Precision", "bf16 PP2", 2, PP2, precision="bf16"),
    row(
        "Precision", "bf16 TP2 x DP2, distributed optimizer", 4, TP2, DISTRIBUTED, precision="bf16"
    ),
    row(
        "Precision", "bf16 PP2 x DP2, distributed optimizer", 4, PP2, DISTRIBUTED, precision="bf16"
    ),
    row("Precision", "bf16 EP2, alltoall", 2, EP2, ALLTOALL, precision="bf16", shared=MOE),
    row("Precision", "fp16 DP2", 2, precision="fp16"),
    row(
        "Precision", "fp16 DP2, overflows skipped", 2, precision="fp16", shared=OVERFLOW, skips=True
    ),
    row(
        "Precision",
        "fp16 PP2, overflows skipped",
        2,
        PP2,
        precision="fp16",
        shared=OVERFLOW,
        skips=True,
    ),
    row(
        "Precision", "fp16 DP2, distributed optimizer", 2, DISTRIBUTED, precision="fp16", short=True
    ),
    row("Precision", "fp16 TP2", 2, TP2, precision="fp16"),
    row("Precision", "fp16 PP2", 2, PP2, precision="fp16"),
)
