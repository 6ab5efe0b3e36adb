# SPDX-License-Identifier: Apache-2.0
"""Which rows of which tensor on disk are which rows of a tensor of our model.

A family is a table of :class:`Rule`. Every way in which the two differ (queries, keys and values
side by side by group, gate above up, one tensor an expert or one for all, padded vocabulary) is a
matter of rows. So one table of spans of rows serves both directions, and a rank that has a box of a
tensor reads the rows of that box alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mb_config import ModelConfig

Where = Literal["once", "every", "dense", "experts"]
Form = Literal["rows", "groups", "vocabulary"]


@frozen
class Rule:
    """A line of a family's table.

    Attributes:
        ours: Our tensor; of a layer, its name within the layer.
        theirs: The tensors on disk that make it up, in order; of a layer, within the layer.
            ``{expert}`` stands for the number of an expert.
        shape: Extents of each of theirs, as names of :func:`sizes`, or one tuple for each.
        where: Once in the model, in every layer, or in those that are dense or have experts.
        form: One below the other (rows); query, key and value of each group in turn (groups); a
            vocabulary that we pad (vocabulary).
    """

    ours: str
    theirs: tuple[str, ...] | str
    shape: tuple[str, ...] | tuple[tuple[str, ...], ...]
    where: Where = "every"
    form: Form = "rows"

    def parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the tensors on disk with the names of their extents."""
        names = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        nested = isinstance(self.shape[0], tuple)
        shapes = self.shape if nested else (self.shape,) * len(names)
        return list(zip(names, shapes, strict=True))  # type: ignore[arg-type]


@frozen
class Span:
    """Successive rows of a tensor on disk; of nothing, where we pad.

    Attributes:
        name: Of the tensor on disk, None for padding.
        start: First row there.
        rows: How many.
        index: Which matrix, where the tensor on disk has all experts in three dimensions.
    """

    name: str | None
    start: int
    rows: int
    index: int | None = None


@frozen
class Target:
    """One of our tensors, or one expert of it, and what it is made of from top to bottom.

    Attributes:
        key: Of our tensor in checkpoints, without ``model.``.
        shape: Its extents; of one expert's matrix where *expert* is given.
        spans: Cover its rows in order.
        expert: Position in the first dimension of our tensor, or None.
    """

    key: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    expert: int | None = None


@frozen
class Table:
    """The mapping of one model.

    Attributes:
        targets: All of our tensors.
        theirs: Shape of each tensor on disk, by name, in the order of the rules.
    """

    targets: tuple[Target, ...]
    theirs: dict[str, tuple[int, ...]]


def sizes(model: ModelConfig) -> dict[str, int]:
    """Return the extents that rules name."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    width = model.kv_channels or hidden // heads
    groups = model.num_query_groups or heads
    expert = model.moe_ffn_hidden_size or model.ffn_hidden_size or 0
    ffn, experts = model.ffn_hidden_size or 0, model.num_moe_experts or 0
    return {
        "one": 1,
        "hidden": hidden,
        "head": width,
        "query": heads * width,
        "kv": groups * width,
        "ffn": ffn,
        "experts": experts,
        "expert_ffn": expert,
        "two_expert_ffn": 2 * expert,
        "shared_ffn": model.moe_shared_expert_intermediate_size or 0,
        "vocab": model.vocab_size or 0,
    }


def expert_layers(model: ModelConfig) -> list[bool]:
    """Return for each layer whether it has experts."""
    if model.num_moe_experts is None:
        return [False] * model.num_layers
    every = model.moe_layer_freq
    if isinstance(every, list):
        return [bool(one) for one in every]
    return [layer % every == 0 for layer in range(model.num_layers)]


def expand(rules: Iterable[Rule], model: ModelConfig, *, layer_prefix: str) -> Table:
    """Return the table of *rules* for a model.

    Args:
        rules: Those that hold for it.
        model: Its resolved section.
        layer_prefix: What names on disk begin with in a layer, with ``{layer}`` for its number.
    """
    rules = list(rules)
    size = sizes(model)
    targets: list[Target] = []
    theirs: dict[str, tuple[int, ...]] = {}

    def add(rule: Rule, ours: str, prefix: str) -> None:
        for target, shapes in _targets(rule, ours, prefix, size, model):
            targets.append(target)
            theirs.update(shapes)

    def once(rule: Rule) -> bool:
        return rule.where == "once"

    for rule in filter(once, rules):
        add(rule, rule.ours, "")
    for layer, with_experts in enumerate(expert_layers(model)):
        kinds = {"every", "experts" if with_experts else "dense"}
        for rule in rules:
            if rule.where in kinds:
                prefix = layer_prefix.format(layer=layer)
                add(rule, f"decoder.layers.{layer}.{rule.ours}", prefix)
    return Table(tuple(targets), theirs)


def _targets(
    rule: Rule, ours: str, prefix: str, size: dict[str, int], model: ModelConfig
) -> Iterator[tuple[Target, dict[str, tuple[int, ...]]]]:
    parts = rule.parts()
    shapes = [tuple(size[extent] for extent in extents) for _, extents in parts]
    fused = parts[0][1][0] == "experts" and len(parts[0][1]) == 3
    apart = "{expert}" in parts[0][0]
    for expert in range(size["experts"]) if fused or apart else [None]:
        names = [prefix + name.format(expert=expert) for name, _ in parts]
        inner = [shape[1:] if fused else shape for shape in shapes]
        whole = [
            Span(name, 0, shape[0], expert if fused else None)
            for name, shape in zip(names, inner, strict=True)
        ]
        spans = _arranged(whole, rule.form, model)
        shape = (sum(span.rows for span in spans), *inner[0][1:])
        yield Target(ours, shape, tuple(spans), expert), dict(zip(names, shapes, strict=True))


def _arranged(whole: list[Span], form: Form, model: ModelConfig) -> list[Span]:
    """Return the rows of *whole* in our order."""
    if form == "vocabulary":
        padding = (model.padded_vocab_size or 0) - whole[0].rows
        return [*whole, Span(None, 0, padding)] if padding > 0 else whole
    if form == "groups":
        groups = model.num_query_groups or model.num_attention_heads
        return [
            Span(span.name, group * (span.rows // groups), span.rows // groups)
            for group in range(groups)
            for span in whole
        ]
    return whole
