# SPDX-License-Identifier: Apache-2.0
"""The one place that lets megatron-core run on CPU tensors over gloo.

Megatron-core writes ``device="cuda"``, ``torch.cuda.current_device()`` and CUDA streams into code
that has nothing else to do with a GPU. :func:`install` gives these words a meaning on a machine
without one: the device is the CPU, streams are always in order, the CUDA generator is torch's
default generator. Each :class:`Patch` says what it replaces, why, and which lines of megatron-core
need it.

Patches are process-global. They are switched on by creating a CPU runtime
(:func:`mb_engine.runtime.distributed.initialize`), never by an import, and not at all where CUDA is
present. They take effect whether megatron-core was imported before or not. Replacements are plain
functions, because a ``TorchFunctionMode`` would tax every operation of the model.

Lines in ``needed_by`` are those of megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from mb_engine.runtime.cpu_collectives import (
    all_to_all_of_lists,
    uneven_all_gather,
    uneven_reduce_scatter,
)
from mb_engine.runtime.cpu_streams import Event, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

_CPU = torch.device("cpu")
_RANDOM = "megatron.core.tensor_parallel.random"


@frozen(kw_only=True)
class Replacement:
    """One attribute that gets another value.

    Attributes:
        owner: Module or class.
        name: Attribute of it.
        value: What it becomes.
    """

    owner: Any
    name: str
    value: Any


@frozen(kw_only=True)
class Patch:
    """Replacements that belong together, and the reason for them.

    Attributes:
        name: Short name.
        reason: What megatron-core does that a CPU cannot.
        needed_by: Lines of megatron-core that fail without it.
        replacements: Makes the replacements from what is there now.
    """

    name: str
    reason: str
    needed_by: tuple[str, ...]
    replacements: Callable[[], Iterator[Replacement]]


def cpu_instead_of_cuda(device: Any) -> Any:
    """Return the CPU device where *device* means a CUDA device, else *device* itself.

    A bare index means a CUDA device to torch, and ``torch.cuda.current_device()`` returns one.
    """
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* with its ``device`` redirected and ``pin_memory`` dropped."""

    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = cpu_instead_of_cuda(kwargs["device"])
        kwargs.pop("pin_memory", None)  # page-locking serves copies to a GPU and needs its driver
        return function(*args, **kwargs)

    return factory


def _factories() -> Iterator[Replacement]:
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like"):
        yield Replacement(owner=torch, name=name, value=_on_cpu(getattr(torch, name)))
    yield Replacement(owner=torch.Tensor, name="new_empty", value=_on_cpu(torch.Tensor.new_empty))


def _moves() -> Iterator[Replacement]:
    tensor_to = torch.Tensor.to

    @functools.wraps(tensor_to)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)):
            args = (cpu_instead_of_cuda(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = cpu_instead_of_cuda(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def cuda(self: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return self

    yield Replacement(owner=torch.Tensor, name="to", value=to)
    yield Replacement(owner=torch.Tensor, name="cuda", value=cuda)


def _type_names() -> Iterator[Replacement]:
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = tensor_type(self, *args, **kwargs)
        if isinstance(name, str) and self.device == _CPU:
            # Only megatron-core is told so; to everybody else a CPU tensor stays one.
            caller = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001
            if caller.startswith("megatron.core."):
                return name.replace("torch.", "torch.cuda.", 1)
        return name

    yield Replacement(owner=torch.Tensor, name="type", value=type_name)


def _current_device() -> Iterator[Replacement]:
    yield Replacement(owner=torch.cuda, name="current_device", value=lambda: 0)


def _synchronize() -> Iterator[Replacement]:
    def nothing_to_wait_for(device: Any = None) -> None:
        del device

    yield Replacement(owner=torch.cuda, name="synchronize", value=nothing_to_wait_for)


def _streams() -> Iterator[Replacement]:
    only_stream = Stream()

    def the_stream(device: Any = None) -> Stream:
        del device
        return only_stream

    def on_stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        del stream
        return contextlib.nullcontext()

    for name, value in (
        ("Stream", Stream),
        ("Event", Event),
        ("current_stream", the_stream),
        ("default_stream", the_stream),
        ("stream", on_stream),
    ):
        yield Replacement(owner=torch.cuda, name=name, value=value)


def _dropout_in_fork(record: logging.LogRecord) -> bool:
    """Filter out the tracker's warning that the CPU generator moved: here it is the tracked one."""
    return "CPU RNG state changed" not in record.getMessage()


def _random() -> Iterator[Replacement]:
    generator = torch.default_generator

    def get_rng_state(device: Any = None) -> Tensor:
        del device
        return generator.get_state()

    def set_rng_state(new_state: Tensor, device: Any = None) -> None:
        del device
        generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    def call_now(callable_: Callable[[], None], **_kwargs: Any) -> None:
        callable_()  # torch would queue it until CUDA starts, which here is never

    def start_nothing() -> None: ...

    for module in (torch.cuda, torch.cuda.random):
        yield Replacement(owner=module, name="get_rng_state", value=get_rng_state)
        yield Replacement(owner=module, name="set_rng_state", value=set_rng_state)
        yield Replacement(owner=module, name="manual_seed", value=manual_seed)
    yield Replacement(owner=torch.cuda, name="default_generators", value=(generator,))
    # random.py imports these two by name, so a module that is loaded already has its own.
    for module in filter(None, (torch.cuda, sys.modules.get(_RANDOM))):
        yield Replacement(owner=module, name="_lazy_call", value=call_now)
        yield Replacement(owner=module, name="_lazy_init", value=start_nothing)
    log = logging.getLogger(_RANDOM)
    yield Replacement(owner=log, name="filters", value=[*log.filters, _dropout_in_fork])


def _all_to_all() -> Iterator[Replacement]:
    exchange = all_to_all_of_lists(torch.distributed.all_to_all_single)
    yield Replacement(owner=torch.distributed, name="all_to_all_single", value=exchange)


def _uneven_collectives() -> Iterator[Replacement]:
    dist = torch.distributed
    gather = uneven_all_gather(dist.all_gather)
    scatter = uneven_reduce_scatter(dist.reduce_scatter)
    yield Replacement(owner=dist, name="all_gather", value=gather)
    yield Replacement(owner=dist, name="reduce_scatter", value=scatter)


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="factories",
        reason="tensors are made with device='cuda' or an index, some of them page-locked",
        needed_by=(
            "distributed/param_and_grad_buffer.py:783",
            "optimizer/clip_grads.py:174",
            "optimizer/optimizer.py:473",
            "pipeline_parallel/p2p_communication.py:313",
            "pipeline_parallel/schedules.py:596",
            "models/common/embeddings/rope_utils.py:63",
            "tensor_parallel/layers.py:261",
            "tensor_parallel/mappings.py:181",
            "tensor_parallel/mappings.py:444",
        ),
        replacements=_factories,
    ),
    Patch(
        name="moves",
        reason="tensors are moved to the current CUDA device",
        needed_by=(
            "models/common/embeddings/rotary_pos_embedding.py:162",
            "models/common/language_module/language_module.py:244",
            "optimizer/grad_scaler.py:140",
            "transformer/moe/router.py:90",
            "utils.py:898",
        ),
        replacements=_moves,
    ),
    Patch(
        name="type_names",
        reason="dtypes are told apart by names such as 'torch.cuda.FloatTensor'",
        needed_by=(
            "optimizer/clip_grads.py:167",
            "optimizer/distrib_optimizer.py:361",
            "optimizer/distrib_optimizer.py:420",
            "optimizer/optimizer.py:671",
            "optimizer/optimizer.py:690",
        ),
        replacements=_type_names,
    ),
    Patch(
        name="current_device",
        reason="the index of the current device is asked for wherever a tensor is made",
        needed_by=(
            "distributed/param_and_grad_buffer.py:783",
            "models/common/embeddings/rotary_pos_embedding.py:78",
            "tensor_parallel/random.py:102",
            "transformer/transformer_layer.py:1147",
        ),
        replacements=_current_device,
    ),
    Patch(
        name="synchronize",
        reason="the device is waited for after pipeline stages exchange tensors",
        needed_by=(
            "pipeline_parallel/p2p_communication.py:242",
            "pipeline_parallel/p2p_communication.py:398",
            "timers.py:152",
        ),
        replacements=_synchronize,
    ),
    Patch(
        name="streams",
        reason="communication is put on streams of its own",
        needed_by=(
            "distributed/param_and_grad_buffer.py:417",
            "distributed/param_and_grad_buffer.py:529",
            "transformer/moe/shared_experts.py:123",
            "transformer/moe/token_dispatcher.py:445",
        ),
        replacements=_streams,
    ),
    Patch(
        name="random",
        reason="dropout and initialisation draw from tracked states of the CUDA generator",
        needed_by=(
            "tensor_parallel/random.py:55",
            "tensor_parallel/random.py:66",
            "tensor_parallel/random.py:111",
            "tensor_parallel/random.py:235",
            "tensor_parallel/random.py:422",
        ),
        replacements=_random,
    ),
    Patch(
        name="all_to_all",
        reason="split sizes become lists only when their tensor is on CUDA; gloo wants lists",
        needed_by=("transformer/moe/moe_utils.py:1093", "tensor_parallel/mappings.py:449"),
        replacements=_all_to_all,
    ),
    Patch(
        name="uneven_collectives",
        reason="experts split over tensor-parallel ranks gather different numbers of tokens, which"
        " NCCL can and gloo cannot",
        needed_by=("tensor_parallel/mappings.py:150", "tensor_parallel/mappings.py:202"),
        replacements=_uneven_collectives,
    ),
)
"""All that is patched, in the order it is applied."""

_applied: set[str] = set()


def apply(patches: Iterable[Patch]) -> None:
    """Apply those of *patches* that this process does not have yet, CUDA or not."""
    for patch in patches:
        if patch.name in _applied:
            continue
        for new in list(patch.replacements()):
            setattr(new.owner, new.name, new.value)
        _applied.add(patch.name)


@contextlib.contextmanager
def eager_import() -> Iterator[None]:
    """Import megatron-core inside this without ``torch.compile`` on its small fused functions.

    On a CPU they would be compiled by a C++ compiler at first use, which a machine may lack and
    which takes longer than it saves; importing the compiler alone takes over a second a rank.
    Does nothing where CUDA is present or megatron-core is imported already.
    """
    compile_ = torch.compile
    if torch.cuda.is_available():
        yield
        return

    def as_is(model: Any = None, **_options: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = as_is
    try:
        yield
    finally:
        torch.compile = compile_


def install() -> bool:
    """Adapt megatron-core to the CPU for the rest of this process.

    Returns:
        False where CUDA is present: nothing is changed there.
    """
    if torch.cuda.is_available():
        return False
    apply(PATCHES)
    return True
