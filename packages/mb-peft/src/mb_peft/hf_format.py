# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk in the format of Hugging Face PEFT.

Source: huggingface/peft, docs/source/developer_guides/checkpoint.md. A folder with
``adapter_config.json`` and ``adapter_model.safetensors``, whose keys are
``base_model.model.<module>.lora_A.weight`` of shape ``[rank, in]`` and ``lora_B`` ``[out, rank]``.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import TYPE_CHECKING, Any

import torch
from mb_config import LoRA
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mb_peft.errors import PeftError
from mb_peft.inject import build_pairs, put_in
from mb_peft.lora import LoRALinear, adapters
from mb_peft.torch_linear import TorchLinears

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn

    from mb_peft.interfaces import LinearFactory

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<name>.+)\.lora_(?P<half>[AB])\.weight")
MUST_BE_EMPTY = (
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "fan_in_fan_out",
)
"""Settings of that format that change what an adapter computes and that are not supported."""


def save_hf_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> pathlib.Path:
    """Write the adapters of *model* for ``peft.PeftModel.from_pretrained`` and ``load_hf_adapter``.

    Weights keep their dtype. That dropout came after the product (``dropout_position="post"``) has
    no place in the format; outputs without dropout are the same.

    Args:
        model: With adapters from ``inject``, merged or not.
        path: A folder, made if it is not there; files of an earlier save are replaced.
        base_model: Name or path of the base model, for others to find it.
        task_type: As PEFT spells it, None for no particular task.

    Returns:
        The folder.

    Raises:
        PeftError: If *model* has no adapters, or they differ in rank or scale.
    """
    layers = adapters(model)
    kinds = {(layer.rank, layer.scale, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        what = "no adapters" if not layers else "adapters that differ in rank, scale or dropout"
        raise PeftError(f"the model has {what}; put them in with one inject(model, LoRA(...))")
    ((rank, scale, dropout),) = kinds
    alpha = scale * rank
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": describe_targets([n for n, _ in model.named_modules()], layers),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {}
    for name, layer in layers.items():
        for half, linear in (("A", layer.lora_a), ("B", layer.lora_b)):
            weight = linear.get_parameter("weight").detach()
            tensors[f"{PREFIX}{name}.lora_{half}.weight"] = weight.cpu().contiguous()
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def describe_targets(names: list[str], layers: Mapping[str, Any]) -> list[str] | str:
    """Return ``target_modules`` that means exactly *layers* to Hugging Face PEFT.

    Short names where all modules of such a name are adapted, else a regular expression.
    """
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    inside = tuple(f"{name}." for name in layers)
    meant = {
        name for name in names if name.rsplit(".", 1)[-1] in short and not name.startswith(inside)
    }
    if meant == set(layers):
        return short
    return "|".join(re.escape(name) for name in layers)


def load_hf_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, factory: LinearFactory | None = None
) -> LoRA:
    """Read adapters from a folder into *model*, putting them in if there are none.

    Args:
        model: Without adapters, or with adapters of the same modules, rank and scale.
        path: A folder as ``save_hf_adapter`` or Hugging Face PEFT writes it. The weights decide
            which modules are adapted.
        factory: Knows the kind of linears; None for ``TorchLinears()``.

    Returns:
        The settings found, with full names as ``target_modules``.

    Raises:
        PeftError: If a file is missing or broken, a setting is one that is not supported, or a
            name or shape does not fit *model*; then nothing has changed.
    """
    folder = pathlib.Path(path)
    weights = _read_weights(folder)
    lora = _read_config(folder)
    lora.target_modules = list(weights)
    layers = adapters(model)
    if layers:
        _check_present(layers, lora, folder)
        _check_shapes({n: (x.lora_a, x.lora_b) for n, x in layers.items()}, weights, folder)
    else:
        modules = dict(model.named_modules())
        missing = [name for name in weights if name not in modules]
        if missing:
            raise PeftError(f"{folder}: adapts {missing[0]}, and the model has no such module")
        factory = factory or TorchLinears()
        pairs = build_pairs({name: modules[name] for name in weights}, lora, factory)
        no_linear = [name for name in weights if name not in pairs]
        if no_linear:
            kind = type(modules[no_linear[0]]).__name__
            raise PeftError(f"{folder}: adapts {no_linear[0]}, which is a {kind} here, no linear")
        _check_shapes(pairs, weights, folder)
        put_in(model, pairs, lora, factory)
        layers = adapters(model)
    with torch.no_grad():
        for name, layer in layers.items():
            for half, linear in (("A", layer.lora_a), ("B", layer.lora_b)):
                linear.get_parameter("weight").copy_(weights[name][half])
    return lora


def _read_weights(folder: pathlib.Path) -> dict[str, dict[str, Tensor]]:
    """Return the two matrices of each module, by ``"A"`` and ``"B"``."""
    file = folder / WEIGHTS
    if not file.exists():
        raise PeftError(f"{file}: no such file; save the adapter with safe_serialization=True")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise PeftError(f"{file}: cannot be read: {error}") from error
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise PeftError(f"{file}: {key} is not the weight of a LoRA adapter of a linear")
        weights.setdefault(match["name"], {})[match["half"]] = tensor
    for name, halves in weights.items():
        if len(halves) != 2:
            lacking = "AB".replace(next(iter(halves)), "")
            raise PeftError(f"{file}: {PREFIX}{name}.lora_{lacking}.weight is missing")
    if not weights:
        raise PeftError(f"{file}: holds no tensors")
    return weights


def _read_config(folder: pathlib.Path) -> LoRA:
    """Return the settings of a folder, refusing those that would compute something else."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except FileNotFoundError:
        raise PeftError(f"{file}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise PeftError(f"{file}: not the configuration of an adapter: {error}") from error
    if kind != "LORA":
        raise PeftError(f"{file}: peft_type={kind}: only LORA can be read")
    for field in MUST_BE_EMPTY:
        if config.get(field):
            raise PeftError(f"{file}: {field}={config[field]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise PeftError(f"{file}: bias={config['bias']!r}: only 'none' is supported")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(rank)
    return LoRA(rank=rank, alpha=float(alpha), dropout=float(config.get("lora_dropout") or 0.0))


def _check_present(layers: Mapping[str, LoRALinear], lora: LoRA, folder: pathlib.Path) -> None:
    """Raise PeftError if the adapters of a model are not those of a folder."""
    odd = sorted(set(layers) ^ set(lora.target_modules))
    if odd:
        where = "the model" if odd[0] in layers else "the folder"
        raise PeftError(
            f"{folder}: only {where} adapts {odd[0]}; remove(model) first to take those of the "
            "folder"
        )
    for name, layer in layers.items():
        if not math.isclose(layer.scale, lora.alpha / lora.rank):
            raise PeftError(
                f"{folder}: alpha/rank is {lora.alpha / lora.rank:g} and {layer.scale:g} in the "
                f"model at {name}; remove(model) first to take that of the folder"
            )


def _check_shapes(
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    weights: Mapping[str, Mapping[str, Tensor]],
    folder: pathlib.Path,
) -> None:
    """Raise PeftError if a matrix of a folder does not fit the model."""
    for name, pair in pairs.items():
        for half, linear in zip("AB", pair, strict=True):
            have, want = weights[name][half].shape, linear.get_parameter("weight").shape
            if have != want:
                raise PeftError(
                    f"{folder}: {name}.lora_{half} has shape {list(have)}, the model needs "
                    f"{list(want)}"
                )
