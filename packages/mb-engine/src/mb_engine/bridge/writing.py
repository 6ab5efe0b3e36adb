# SPDX-License-Identifier: Apache-2.0
"""Our tensors, one at a time, into a folder in the Hugging Face format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from mb_engine.bridge.config import config_to_hf
from mb_engine.bridge.family import Family, family
from mb_engine.bridge.hub_format import BLOCK_BYTES, DTYPES, INDEX
from mb_engine.bridge.hub_writer import HubWriter, Planned, dtype_name, in_files
from mb_engine.bridge.loading import EMBEDDING, TIED_OUTPUT
from mb_engine.bridge.source import CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from mb_config import ModelConfig
    from torch import Tensor

    from mb_engine.bridge.mapping import Table, Target
    from mb_engine.bridge.source import HubSource


class Outgoing:
    """What a model becomes in the Hugging Face format: family, table, files and names.

    Args:
        model: Its resolved section.
        source: The folder that it came from, if any: its names, dtypes, files and
            configuration are used again.
        dtype: Of the tensors that did not come from a folder; None for that of the parameters.
        name: Of the family of a model that did not come from a folder; None finds one.
    """

    def __init__(
        self,
        model: ModelConfig,
        source: HubSource | None,
        *,
        dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        self.source = source
        if source is not None:
            self.family: Family = family(source.family)
            self.files = dict(source.files)
            self.table: Table = self.family.table(model, [t.name for t in source.tensors])
            self.plan = [
                t for t in source.tensors if t.name in self.table.theirs or self._is_extra(t)
            ]
        else:
            self.family, config = config_to_hf(model, name=name)
            own: torch.dtype = getattr(torch, model.params_dtype or "float32")
            config["dtype"] = str(dtype or own).removeprefix("torch.")
            self.files = {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
            self.table = self.family.table(model)
            self.plan = in_files(
                [
                    Planned(name=theirs, dtype=dtype_name(dtype or own), shape=shape)
                    for theirs, shape in self.table.theirs.items()
                ]
            )

    def _is_extra(self, tensor: Planned) -> bool:
        return tensor.name == TIED_OUTPUT or tensor.name.endswith(self.family.constants)

    def write(self, folder: Path, tensors: Iterable[tuple[Target, Tensor]]) -> None:
        """Write the folder: weights from *tensors*, then the other files.

        Args:
            folder: Made if it is not there.
            tensors: Every target of the table with its values ``[rows, ...]``, in any order.

        Raises:
            MappingError: If a tensor is not written whole.
        """
        metadata = None if self.source is None else self.source.metadata
        with HubWriter(folder, self.plan, metadata=metadata) as writer:
            names = {planned.name for planned in self.plan}
            for target, values in tensors:
                for name, first, rows, index in blocks(target, values):
                    writer.write_rows(name, first, rows, index=index)
                    if name == EMBEDDING and name != TIED_OUTPUT and self._repeats(names):
                        writer.write_rows(TIED_OUTPUT, first, rows)
            for name, value in self._constants():
                writer.write_rows(name, 0, value)
            writer.finish(index=INDEX not in self.files)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def _repeats(self, names: set[str]) -> bool:
        return TIED_OUTPUT in names and TIED_OUTPUT not in self.table.theirs

    def _constants(self) -> Iterator[tuple[str, Tensor]]:
        planned = {tensor.name: tensor for tensor in self.plan}
        for name, value in (self.source.constants if self.source else {}).items():
            flat = torch.frombuffer(bytearray(value), dtype=torch.uint8)
            yield name, flat.view(DTYPES[planned[name].dtype]).view(planned[name].shape)


def blocks(target: Target, values: Tensor) -> Iterator[tuple[str, int, Tensor, int | None]]:
    """Yield name, first row, rows and matrix of what *values* are on disk, in blocks.

    Args:
        target: What they are here.
        values: ``[rows, ...]``, all rows.
    """
    row_bytes = max(1, values[:1].numel() * values.element_size())
    step = max(1, BLOCK_BYTES // row_bytes)
    row = 0
    for span in target.spans:
        if span.name is not None:
            for start in range(0, span.rows, step):
                rows = values[row + start : row + min(span.rows, start + step)]
                yield span.name, span.start + start, rows, span.index
        row += span.rows


def whole_tensors(
    table: Table, tensors: Iterable[tuple[Target, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on disk by name as soon as each is whole.

    Args:
        table: Of the model.
        tensors: Every target with its values.
    """
    begun: dict[str, tuple[Tensor, int]] = {}
    for target, values in tensors:
        for name, first, rows, index in blocks(target, values):
            out, left = begun.get(name) or (_empty(table.theirs[name], values), -1)
            left = out.numel() if left < 0 else left
            matrix = out if index is None else out[index]
            matrix[first : first + rows.size(0)] = rows
            begun[name] = (out, left - rows.numel())
            if begun[name][1] == 0:
                yield name, begun.pop(name)[0]


def _empty(shape: tuple[int, ...], like: Tensor) -> Any:
    return torch.empty(shape, dtype=like.dtype, device=like.device)
