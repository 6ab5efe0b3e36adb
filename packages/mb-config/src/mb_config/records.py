# SPDX-License-Identifier: Apache-2.0
"""Records the packages exchange: frozen values, without torch at run time.

A new field with a default is a minor version of this package; any other change breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import Factory, field, frozen

if TYPE_CHECKING:
    from torch import Tensor


@frozen(kw_only=True, eq=False)
class TensorShard:
    """One local piece of a global tensor.

    The piece is the box ``[offset, offset + local_shape)`` of a tensor of ``global_shape``. With
    ``flat_range=(start, stop)`` only the elements ``start:stop`` of that box, counted in row-major
    order, are here, and ``data`` is one-dimensional with ``stop - start`` elements (a distributed
    optimizer owns such ranges).

    Attributes:
        key: Name of the global tensor, the same on every rank.
        data: The values, ``local_shape`` or one-dimensional with ``flat_range``; any device. A load
            writes into it.
        global_shape: Shape of the whole tensor.
        offset: First index of the box in each dimension.
        local_shape: Extent of the box in each dimension.
        dtype: Name as torch prints it without the prefix, such as ``"bfloat16"``.
        replica_id: 0 on the one rank that writes this piece, positive on ranks with a copy of it.
        flat_range: Elements of the box that are here, or None for all of them.
        read_rows: Where ``data`` is on ``meta``, for a save: returns its rows ``start:stop`` along the
            first dimension, when they are written. So a state may be larger than the memory. None
            where ``data`` has values.
    """

    key: str
    data: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: str
    replica_id: int = 0
    flat_range: tuple[int, int] | None = None
    read_rows: Callable[[int, int], Tensor] | None = None

    @classmethod
    def whole(cls, key: str, data: Tensor, *, replica_id: int = 0) -> TensorShard:
        """Return the piece that is all of a tensor."""
        shape = tuple(data.shape)
        return cls(
            key=key,
            data=data,
            global_shape=shape,
            offset=(0,) * len(shape),
            local_shape=shape,
            dtype=str(data.dtype).removeprefix("torch."),
            replica_id=replica_id,
        )


@frozen(kw_only=True)
class ProcessLayout:
    """This rank's place in a parallel job: degrees, coordinates and process groups.

    Attributes:
        rank: Global rank.
        world_size: Number of ranks.
        local_rank: Rank on this machine.
        device: Torch device name of this rank, such as ``"cuda:0"`` or ``"cpu"``.
        tp, pp, vpp, cp, dp, ep, etp: Degrees of tensor, pipeline, virtual pipeline, context, data,
            expert and expert-tensor parallelism (``vpp`` is 1 without interleaving).
        tp_rank, pp_rank, cp_rank, dp_rank, ep_rank: Coordinates.
        groups: Process groups by axis name (``"tp"``, ``"pp"``, ``"cp"``, ``"dp"``, ``"dp_cp"``,
            ``"ep"``, ``"mp"``, ``"world"``); opaque here.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    cp_rank: int = 0
    dp_rank: int = 0
    ep_rank: int = 0
    groups: Mapping[str, Any] = field(default=Factory(dict), eq=False, repr=False)

    def describe(self) -> str:
        """Return the degrees above 1 as words, such as ``"TP2 x DP4"``, or ``"1 rank"``."""
        names = ("tp", "pp", "vpp", "cp", "dp", "ep")
        parts = [f"{n.upper()}{getattr(self, n)}" for n in names if getattr(self, n) > 1]
        return " x ".join(parts) or "1 rank"


@frozen(kw_only=True, eq=False)
class LossTerms:
    """What an objective returns: sums, so that any split of a batch adds up to the same mean.

    Attributes:
        loss_sum: 0-d float32, the loss summed over unmasked tokens, with its graph.
        num_tokens: 0-d integer tensor, how many tokens ``loss_sum`` covers.
        metrics: Further ``name -> (sum, count)`` pairs of 0-d tensors, reported as ``sum / count``.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(factory=dict)

    @property
    def loss(self) -> Tensor:
        """Mean loss per token, 0-d float32; nan where no token counts."""
        return self.loss_sum / self.num_tokens


@frozen(kw_only=True)
class Metric:
    """One named number of one step.

    Attributes:
        name: Path-like name, such as ``"train/loss"``.
        value: The number.
        step: Optimizer steps done when it was measured.
        unit: Unit in words, such as ``"s"``, ``"tokens/s"``, or empty.
        reduce: How values of several ranks or steps combine.
    """

    name: str
    value: float
    step: int
    unit: str = ""
    reduce: Literal["mean", "sum", "max", "min", "last"] = "mean"


@frozen(kw_only=True)
class RunInfo:
    """What is known when a run starts; the first record a callback gets.

    Attributes:
        run_name: Name for people.
        config: The resolved configuration as plain data.
        layout: The parallel layout in words.
        world_size: Number of ranks.
        device: Kind of device in words.
        start_step: Optimizer steps done before this run (0 unless resumed).
        total_steps: Steps at which the run will end, None if only a time limit ends it.
        sequence_length: Tokens a sample.
        num_parameters: Parameters of the whole model, over all ranks.
        flops_per_token: Model FLOPs of forward and backward of one token, without recomputation.
        versions: Package versions by name.
    """

    run_name: str
    config: Mapping[str, Any] = field(factory=dict, repr=False)
    layout: str = "1 rank"
    world_size: int = 1
    device: str = "cpu"
    start_step: int = 0
    total_steps: int | None = None
    sequence_length: int = 0
    num_parameters: int = 0
    flops_per_token: float = 0.0
    versions: Mapping[str, str] = field(factory=dict)


@frozen(kw_only=True)
class StepEvent:
    """One logging interval of training; values are means over its steps unless said otherwise.

    Attributes:
        step: Optimizer steps done, this one included.
        consumed_samples: Samples consumed so far, in all.
        consumed_tokens: Tokens consumed so far, in all.
        loss: Mean loss a token, in nats.
        learning_rate: Of the last step in the interval.
        weight_decay: Of the last step in the interval.
        grad_norm: Global L2 norm before clipping, of the last step; None where not computed.
        loss_scale: Of the last step; None without loss scaling.
        global_batch_size: Samples a step, of the last step.
        skipped_steps: Steps of the interval whose update was skipped.
        seconds: Wall time a step.
        tokens_per_second: Over all ranks.
        tflops_per_device: Model TFLOP/s a device; 0 where unknown.
        metrics: Further numbers by name.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    learning_rate: float
    weight_decay: float = 0.0
    grad_norm: float | None = None
    loss_scale: float | None = None
    global_batch_size: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    tflops_per_device: float = 0.0
    metrics: Mapping[str, float] = field(factory=dict)


@frozen(kw_only=True)
class EvalEvent:
    """The result of one evaluation on one data set.

    Attributes:
        step: Optimizer steps done before it.
        name: Name of the data set, such as ``"validation"``.
        loss: Mean loss a token, in nats.
        perplexity: ``exp(min(20, loss))``.
        num_tokens: Tokens the mean covers.
        seconds: Wall time.
        metrics: Further numbers by name.
    """

    step: int
    name: str
    loss: float
    perplexity: float
    num_tokens: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(factory=dict)


@frozen(kw_only=True)
class SaveEvent:
    """A checkpoint was begun, is durable, or failed.

    Attributes:
        step: The step saved.
        path: Where.
        status: ``"started"`` when training may go on, ``"saved"`` when durable, or ``"failed"``.
        seconds: Blocking time for ``"started"``, time until durable for ``"saved"``.
        error: One line, for ``"failed"``.
    """

    step: int
    path: str
    status: Literal["started", "saved", "failed"]
    seconds: float = 0.0
    error: str = ""


@frozen(kw_only=True)
class RunEnd:
    """The last record of a run.

    Attributes:
        step: Optimizer steps done.
        reason: Why it ended, in words, such as ``"train_iters reached"`` or ``"SIGTERM"``.
        seconds: Wall time of the run.
        exit_code: What the process will return.
    """

    step: int
    reason: str
    seconds: float = 0.0
    exit_code: int = 0


Event = RunInfo | StepEvent | EvalEvent | SaveEvent | RunEnd
"""What a callback or sink is given, one at a time."""
