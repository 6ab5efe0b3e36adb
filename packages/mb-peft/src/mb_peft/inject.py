# SPDX-License-Identifier: Apache-2.0
"""Putting adapters into a model and taking them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.backends import mha

from mb_peft.errors import PeftError
from mb_peft.lora import LoRALinear, adapters
from mb_peft.report import Adapted, Report
from mb_peft.targets import select
from mb_peft.torch_linear import TorchLinears

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mb_config import LoRA

    from mb_peft.interfaces import LinearFactory

Pair = tuple[nn.Module, nn.Module]


def inject(
    model: nn.Module,
    lora: LoRA,
    *,
    targets: Iterable[str] | None = None,
    factory: LinearFactory | None = None,
) -> Report:
    """Put a trainable adapter beside each target linear of *model* and freeze all else.

    The model is changed in place: a target becomes a ``LoRALinear`` that holds it as ``base``. With
    the default initialisation the outputs are those from before, bit for bit. All is checked
    before anything is changed.

    Args:
        model: Any module; on any device, in any dtype.
        lora: Rank, scale, dropout, initialisation, and which modules.
        targets: Patterns to use in place of ``lora.target_modules``; see ``targets``. Modules that
            are not linears are passed over where the same pattern finds a linear too.
        factory: Knows the kind of linears; None for ``TorchLinears()``.

    Returns:
        What will train.

    Raises:
        PeftError: If a pattern finds no linear, a linear is of a kind that cannot be adapted, the
            initialisation could never train, or *model* has adapters already.
    """
    factory = factory or TorchLinears()
    patterns = list(lora.target_modules if targets is None else targets)
    if not patterns:
        raise PeftError("target_modules is empty: name at least one linear, such as '*.q_proj'")
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    found = select(list(modules), patterns, exclude=lora.exclude_modules)
    _check_untouched(model)
    first = {id(module): name for name, module in reversed(modules.items())}
    found = {p: [first[id(modules[n])] for n in names] for p, names in found.items()}
    wanted = {name for names in found.values() for name in names}
    pairs = build_pairs({n: m for n, m in modules.items() if n in wanted}, lora, factory)
    for pattern, names in found.items():
        if not names:
            raise PeftError(f"target_modules: exclude_modules leaves nothing of '{pattern}'")
        if not set(names) & set(pairs):
            kind = type(modules[names[0]]).__name__
            raise PeftError(
                f"target_modules: '{pattern}' finds {names[0]}, a {kind}, and no linear; name the "
                "linears in it"
            )
    return put_in(model, pairs, lora, factory)


def build_pairs(
    modules: Mapping[str, nn.Module], lora: LoRA, factory: LinearFactory
) -> dict[str, Pair]:
    """Return the two linears of an adapter for each of *modules* that is a linear.

    Raises:
        PeftError: If one cannot be adapted; names it.
    """
    if lora.lora_A_init_method == lora.lora_B_init_method == "zero":
        raise PeftError(
            "lora_A_init_method=zero and lora_B_init_method=zero: neither would ever get a "
            "gradient; set lora_A_init_method=xavier"
        )
    pairs = {}
    for name, module in modules.items():
        try:
            pair = factory.pair(module, rank=lora.rank)
        except PeftError as error:
            raise PeftError(f"{name} {error}") from None
        if pair is not None:
            pairs[name] = pair
    return pairs


def put_in(
    model: nn.Module, pairs: Mapping[str, Pair], lora: LoRA, factory: LinearFactory
) -> Report:
    """Freeze *model*, replace the modules named in *pairs* by adapted ones, and report.

    Raises:
        PeftError: If a module would be read past its adapter; then nothing has changed.
    """
    _check_parents(model, pairs)
    model.requires_grad_(requires_grad=False)
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    rows = []
    for name, pair in pairs.items():
        base = model.get_submodule(name)
        layer = LoRALinear(base, pair, config=lora, factory=factory)
        layer.train(base.training)
        for place in places[id(base)]:  # one module may stand at several places
            model.set_submodule(place, layer)
        size = sum(p.numel() for linear in pair for p in linear.parameters())
        shape = tuple(layer.weight.shape)
        rows.append(Adapted(name=name, shape=shape, rank=lora.rank, parameters=size))
    return Report(
        adapted=tuple(rows),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )


def remove(model: nn.Module) -> int:
    """Take the adapters out of *model*, leaving the linears as they are now.

    After ``merge`` that is the merged model, otherwise the one from before ``inject``. Its
    parameters stay frozen.

    Returns:
        How many adapters were taken out.
    """
    layers = adapters(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.base)
    return len(layers)


def _check_parents(model: nn.Module, names: Iterable[str]) -> None:
    """Raise PeftError for linears in a layer that in evaluation reads their weights directly."""
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        fast = isinstance(parent, nn.TransformerEncoderLayer) and mha.get_fastpath_enabled()
        if fast:
            raise PeftError(
                f"{name} is in a nn.TransformerEncoderLayer, whose fast path in evaluation reads "
                "weights past any adapter; call torch.backends.mha.set_fastpath_enabled(False)"
            )


def _check_untouched(model: nn.Module) -> None:
    if layers := adapters(model):
        raise PeftError(
            f"the model has adapters already, the first at {next(iter(layers))}; merge(model) or "
            "not, then remove(model), before putting in others"
        )
