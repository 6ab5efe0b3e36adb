# SPDX-License-Identifier: Apache-2.0
"""What a family of models is to the bridge, and where families are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen
from mb_config import ModelConfig, plugins

from mb_engine.bridge.errors import MappingError, UnknownFamilyError
from mb_engine.bridge.mapping import Table, expand

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from mb_engine.bridge.mapping import Rule

GROUP = "mb.model_families"
"""Entry-point group in which packages register a :class:`Family`."""

FUSED, APART = "fused", "apart"


@frozen
class Part:
    """A matter that a model's ``config.json`` and our model section say in different words.

    Attributes:
        read: From ``config.json`` to fields of ``ModelConfig``.
        write: Back, to entries of ``config.json``.
    """

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@frozen(kw_only=True)
class Family:
    """A table of tensors and a table of settings, each good for both directions.

    Attributes:
        name: Its entry point has the same.
        architecture: Name of the class in ``transformers``, as in ``architectures``.
        model_type: As in ``config.json``.
        rules: Lines of the table of tensors, each with the condition under which it holds, a key of
            :data:`CONDITIONS`.
        parts: The table of settings.
        fixed: Fields of ``ModelConfig`` that are the same in all models of the family.
        layer_prefix: What names of tensors on disk begin with in a layer.
        constants: Ends of names of tensors on disk that no parameter holds and that are carried as
            they are, such as frequencies that follow from the configuration.
    """

    name: str
    architecture: str
    model_type: str
    rules: tuple[tuple[str, Rule], ...]
    parts: tuple[Part, ...]
    fixed: Mapping[str, Any]
    layer_prefix: str = "model.layers.{layer}."
    constants: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def read_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` that a ``config.json`` stands for.

        Raises:
            MappingError: If our model has no such thing; names the entry.
        """
        fields = dict(self.fixed)
        for part in self.parts:
            fields |= part.read(config)
        return fields

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Return the ``config.json`` of a model section, without what no part of it says.

        Raises:
            MappingError: If the family has no such thing; names the field.
        """
        wrong = [
            f"model.{name}={getattr(model, name)!r}, the family has {value!r}"
            for name, value in self.fixed.items()
            if getattr(model, name) != value
        ]
        if wrong:
            raise MappingError(f"no model of the family {self.name}: {'; '.join(wrong)}")
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
        }
        for part in self.parts:
            config |= part.write(model)
        return config

    def table(self, model: ModelConfig, on_disk: Collection[str] = ()) -> Table:
        """Return which rows are which for one model.

        Args:
            model: Its resolved section.
            on_disk: Names of tensors: tells whether experts are one by one or fused.
        """
        fused = any(
            name.endswith(rule.parts()[0][0])
            for condition, rule in self.rules
            if condition == FUSED
            for name in on_disk
        )
        chosen = [
            rule
            for condition, rule in self.rules
            if (condition == FUSED) == fused or condition not in {FUSED, APART}
            if condition in {FUSED, APART} or CONDITIONS[condition](model)
        ]
        return expand(chosen, model, layer_prefix=self.layer_prefix)


CONDITIONS: dict[str, Callable[[ModelConfig], bool]] = {
    "always": lambda _: True,
    "untied": lambda m: not m.share_embeddings_and_output_weights,
    "qkv bias": lambda m: m.add_qkv_bias or m.add_bias_linear,
    "output bias": lambda m: m.attention_output_bias or m.add_bias_linear,
    "mlp bias": lambda m: m.add_bias_linear,
    "qk norm": lambda m: m.qk_layernorm,
}
"""When a rule holds; ``fused`` and ``apart`` besides, by how experts lie on disk."""


def families() -> tuple[str, ...]:
    """Return the names of all families that are installed."""
    return plugins.names(GROUP)


def family(name: str) -> Family:
    """Return a family by name.

    Raises:
        UnknownFamilyError: With the names there are.
    """
    if name not in families():
        raise UnknownFamilyError(_unknown(f"family {name!r}"))
    found: Family = plugins.load(GROUP, name)
    return found


def family_of(config: Mapping[str, Any], *, where: str) -> Family:
    """Return the family of a ``config.json``.

    Args:
        config: Its content.
        where: Its place, for the message.

    Raises:
        UnknownFamilyError: With the families there are, and how to add one.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = []
    known = [family(name) for name in families()]
    for one in known:
        if one.architecture in architectures:
            return one
    if not architectures:
        for one in known:
            if one.model_type == config.get("model_type"):
                return one
    what = ", ".join(map(str, architectures)) or f"model_type {config.get('model_type')!r}"
    raise UnknownFamilyError(f"{where}: {_unknown(f'architecture {what}')}")


def _unknown(what: str) -> str:
    return (
        f"there is no mapping for {what}; there are {', '.join(families())}; to add one, write a"
        f" Family and register it as an entry point in {GROUP!r}, see"
        " docs/adding-a-model-family.md"
    )
