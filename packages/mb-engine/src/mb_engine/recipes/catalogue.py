# SPDX-License-Identifier: Apache-2.0
"""Recipes: a published model, a task, and a layout for the GPUs there are."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen
from mb_config import ConfigContainer

from mb_engine.errors import EngineError
from mb_engine.recipes.layouts import LAYOUTS, overrides
from mb_engine.recipes.published import PUBLISHED, Published

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mb_config import ModelConfig

GPU = "h100-80gb"
"""What the layouts are for."""

_SEQ_LENGTH = 4096
_COMMON = (
    "mixed_precision=bf16_mixed",
    "ddp.grad_reduce_in_fp32=true",
    "train.manual_gc=true",
    "train.manual_gc_interval=100",
    "scheduler.lr_decay_style=cosine",
    "tokenizer.tokenizer_type=huggingface",
)
_PRETRAIN = (
    "train.global_batch_size=512",
    "train.train_iters=300000",
    "optimizer.lr=3e-4",
    "optimizer.min_lr=3e-5",
    "optimizer.weight_decay=0.1",
    "scheduler.lr_warmup_iters=500",
    "validation.eval_interval=500",
    "validation.eval_iters=32",
)
_SFT = (
    "dataset.type=sft",
    "dataset.packing=offline",
    "train.global_batch_size=128",
    "train.micro_batch_size=1",
    "train.train_iters=1000",
    "optimizer.lr=5e-6",
    "optimizer.adam_beta2=0.98",
    "scheduler.lr_warmup_iters=50",
)
_EXPERTS = (
    "model.moe_token_dispatcher_type=alltoall",
    "model.moe_grouped_gemm=true",
    "model.moe_router_dtype=fp32",
)


@frozen(kw_only=True)
class Recipe:
    """A recipe as it is listed.

    Attributes:
        name: Model and task, such as ``qwen3_8b_sft``.
        model: Key of the published models.
        task: ``pretrain`` or ``sft``.
        hub: Name of the weights on the Hugging Face hub.
        parameters: Of the model.
        gpus: Numbers of H100s that there is a layout for.
    """

    name: str
    model: str
    task: str
    hub: str
    parameters: int
    gpus: tuple[int, ...]


def pretrain(model: str, *, gpus: int | None = None) -> ConfigContainer:
    """Return a configuration that trains a published model from random weights.

    Sequences of 4096 tokens, 512 a step, bf16_mixed, Adam with a cosine schedule from 3e-4 to 3e-5.
    ``dataset.path`` and ``tokenizer.tokenizer_model`` are left to be set.

    Args:
        model: Such as ``qwen3_8b``; see :func:`recipes`.
        gpus: How many H100s; None for the fewest that it fits.

    Raises:
        EngineError: If there is no such model.
    """
    return _made(model, _PRETRAIN, gpus)


def sft(model: str, *, gpus: int | None = None) -> ConfigContainer:
    """Return a configuration that fine-tunes all weights of a published model.

    Prompts with completions or chats, packed into rows of 4096 tokens, 128 rows a step, bf16_mixed,
    learning rate 5e-6. ``dataset.path`` and ``checkpoint.pretrained_checkpoint``, a Hugging Face
    folder, are left to be set.

    Args:
        model: Such as ``qwen3_8b``; see :func:`recipes`.
        gpus: How many H100s; None for the fewest that it fits.

    Raises:
        EngineError: If there is no such model.
    """
    return _made(model, _SFT, gpus)


_TASKS: dict[str, Callable[..., ConfigContainer]] = {"pretrain": pretrain, "sft": sft}


def recipes() -> tuple[Recipe, ...]:
    """Return all recipes."""
    return tuple(
        Recipe(
            name=f"{model}_{task}",
            model=model,
            task=task,
            hub=published.hub,
            parameters=published.parameters,
            gpus=tuple(sorted(LAYOUTS[model])),
        )
        for model, published in PUBLISHED.items()
        for task in _TASKS
    )


def recipe(name: str, *, gpus: int | None = None) -> ConfigContainer:
    """Return the configuration of a recipe by its name.

    Args:
        name: Such as ``qwen3_8b_sft``.
        gpus: How many H100s; None for the fewest that the model fits.

    Raises:
        EngineError: If there is no such recipe; has a near name.
    """
    model, _, task = name.rpartition("_")
    if model not in PUBLISHED or task not in _TASKS:
        raise _unknown("recipe", name, [one.name for one in recipes()])
    return _TASKS[task](model, gpus=gpus)


def load_recipe(name: str, changes: Sequence[str], *, gpus: int | None = None) -> ConfigContainer:
    """Return a recipe with overrides, and the tokenizer of its starting weights if none is set.

    Args:
        name: Of the recipe.
        changes: Overrides as on the command line.
        gpus: As :func:`recipe` takes it.

    Raises:
        EngineError: If there is no such recipe.
        ConfigError: If an override cannot be used.
    """
    config = recipe(name, gpus=gpus).override(*changes)
    tokenizer, initial = config.tokenizer, config.checkpoint.pretrained_checkpoint
    needs_one = tokenizer.tokenizer_type == "huggingface" and tokenizer.tokenizer_model is None
    if needs_one and initial is not None and (Path(initial) / "config.json").is_file():
        tokenizer.tokenizer_model = initial
    return config


def _made(name: str, task: tuple[str, ...], gpus: int | None) -> ConfigContainer:
    if name not in PUBLISHED:
        raise _unknown("model", name, list(PUBLISHED))
    config = ConfigContainer(model=_architecture(PUBLISHED[name]))
    layout = _layout(name, gpus)
    experts = _EXPERTS if config.model.num_moe_experts else ()
    return config.override(*_COMMON, *experts, *layout, *task)


def _architecture(published: Published) -> ModelConfig:
    from mb_engine.bridge.config import model_from_hf
    from mb_engine.bridge.family import family

    chosen = family(published.family)
    model = model_from_hf(published.config, chosen, where=published.hub)
    model.seq_length = _SEQ_LENGTH
    if model.normalize_branch_outputs:
        model.layer_spec = "torch"  # the only one that has it, whatever is installed
    return model


def _layout(name: str, gpus: int | None) -> list[str]:
    """Return the layout whose number of GPUs is the most that divides *gpus*, or the fewest."""
    there = LAYOUTS[name]
    dividing = [count for count in there if gpus is not None and gpus % count == 0]
    return overrides(there[max(dividing, default=min(there))])


def _unknown(what: str, name: str, known: list[str]) -> EngineError:
    near = difflib.get_close_matches(name, known, n=3)
    remedy = f"did you mean {' or '.join(near)}?" if near else "see mb-train recipes"
    return EngineError(f"there is no {what} {name!r}; {remedy}")
