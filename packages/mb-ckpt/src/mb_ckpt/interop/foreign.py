# SPDX-License-Identifier: Apache-2.0
"""What readers of other formats return, and what their writers are given."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from mb_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_ckpt.states.storable import TensorToRead

Format = Literal["safetensors", "dcp", "torch_dist"]


@frozen(kw_only=True, eq=False)
class Incoming:
    """A checkpoint of another format, opened; no tensor has been read.

    Attributes:
        format: Which one.
        path: Where it is.
        step: Optimizer steps done, None if the checkpoint does not say.
        state: Nested mappings and sequences whose leaves are `TensorToRead` and plain data.
        left_out: What cannot be taken over, a line each with the reason.
    """

    format: Format
    path: str
    step: int | None
    state: Mapping[str, Any]
    left_out: tuple[str, ...] = ()


@frozen(kw_only=True, eq=False)
class Outgoing:
    """A step that is to be written in another format; no tensor has been read.

    Attributes:
        step: Optimizer steps done.
        tensors: By key.
        state: Nested, as it was saved but for what was renamed: tensors that were plain are here as
            well, under their path; those that were shards are in ``tensors`` alone.
        plain: ``state`` without tensors.
    """

    step: int
    tensors: Mapping[str, TensorToRead] = field(repr=False)
    state: Mapping[str, Any] = field(repr=False)
    plain: Mapping[str, Any] = field(repr=False)


def load_part(reference: str, format_: str) -> Any:
    """Return what *reference*, ``module:name``, names; modules of formats are imported when needed.

    Raises:
        CheckpointError: If a module that *format_* needs is missing; names it.
    """
    try:
        return resolve_name(reference)
    except ModuleNotFoundError as e:
        raise CheckpointError(
            f"{format_} needs the module {e.name}, which is not installed: install it, or use "
            "another format"
        ) from e
