# SPDX-License-Identifier: Apache-2.0
"""What a save remembers of the state of the last one, so as not to look at every tensor again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from attrs import define, field, frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from mb_ckpt.states.pieces import Spec


@frozen(kw_only=True, eq=False)
class KnownMapping:
    """A mapping from strings to plain tensors alone.

    Attributes:
        keys, dtypes, shapes: Of its items, in order.
        specs: By dotted path, in order.
        changing: Positions of buffers of modules.
        buffers: Paths of buffers of the module around it; empty without one.
        tree: What stands for it among the plain data.
    """

    keys: list[str]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    specs: dict[str, Spec]
    changing: list[int]
    buffers: set[str]
    tree: Any

    @classmethod
    def of(
        cls,
        value: Mapping[Any, Any],
        kinds: frozenset[type],
        specs: list[Spec],
        buffers: set[str],
        tree: Any,
    ) -> Self | None:
        """Return what is to be known of *value*; None if it holds anything but plain tensors."""
        tensors = list(value.values())
        strings = all(type(key) is str for key in value)
        if not (strings and tensors and kinds.issuperset(map(type, tensors))):
            return None
        return cls(
            keys=list(value),
            dtypes=[t.dtype for t in tensors],
            shapes=[t.shape for t in tensors],
            specs={spec.key: spec for spec in specs},
            changing=[i for i, spec in enumerate(specs) if spec.fixed],
            buffers=buffers,
            tree=tree,
        )

    def tensors(
        self, value: Mapping[Any, Any], kinds: frozenset[type], buffers: set[str]
    ) -> list[Tensor] | None:
        """Return the tensors of *value* if it differs from this mapping in nothing but values.

        Args:
            value: A mapping at the same path.
            kinds: Types of plain tensors.
            buffers: Paths of buffers of the module around it.
        """
        if len(value) != len(self.keys) or list(value) != self.keys or buffers != self.buffers:
            return None
        tensors = list(value.values())
        same = (
            kinds.issuperset(map(type, tensors))
            and [t.dtype for t in tensors] == self.dtypes
            and [t.shape for t in tensors] == self.shapes
        )
        return tensors if same else None


@define(eq=False)
class Memo:
    """Of one state; given to `mb_ckpt.states.flattening.flatten` again and again.

    Attributes:
        specs: By key or identity of a shard.
        mappings: By dotted path.
        dtensors: By dotted path: how a DTensor was split, as torch has it, and its spec.
    """

    specs: dict[Any, Spec] = field(factory=dict)
    mappings: dict[str, KnownMapping] = field(factory=dict)
    dtensors: dict[str, tuple[Any, Spec]] = field(factory=dict)

    def take(self, other: Memo) -> None:
        """Become what *other* is."""
        self.specs, self.mappings, self.dtensors = other.specs, other.mappings, other.dtensors
