# SPDX-License-Identifier: Apache-2.0
"""What of a Hugging Face folder is kept with a model, so that it can be made again without it."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, frozen
from mb_config.records import TensorShard

from mb_engine.bridge.errors import HubFormatError
from mb_engine.bridge.family import Family, family, family_of
from mb_engine.bridge.hub_writer import Planned

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mb_engine.bridge.hub_format import HubTensors

CONFIG = "config.json"
_KEY = "hub.source"
_CARRIED = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_LARGEST_FILE = 64 << 20
_OWN = "__source__.json"
_OLDEST = (1980, 1, 1, 0, 0, 0)


@frozen(kw_only=True, eq=False)
class HubSource:
    """A folder without its weights.

    Attributes:
        family: Name of the family.
        files: Content of config.json, generation_config.json, the index and the tokenizer's files.
        tensors: What the folder's weights are called, and where they lie.
        metadata: Text in the header of each file of weights.
        constants: Values of tensors that no parameter holds, by name.
    """

    family: str
    files: Mapping[str, bytes]
    tensors: tuple[Planned, ...] = ()
    metadata: Mapping[str, Mapping[str, str]]
    constants: Mapping[str, bytes]

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return parse_config(self.files[CONFIG], where=CONFIG)

    @functools.cached_property
    def packed(self) -> torch.Tensor:
        """Return all of it as bytes, uint8 ``[N]``, the same for the same content."""
        stream = io.BytesIO()
        own = {
            "family": self.family,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "metadata": {file: dict(texts) for file, texts in self.metadata.items()},
            "constants": {name: value.hex() for name, value in self.constants.items()},
        }
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in ({_OWN: json.dumps(own).encode()} | dict(self.files)).items():
                archive.writestr(zipfile.ZipInfo(name, _OLDEST), content, zipfile.ZIP_DEFLATED)
        return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, data: torch.Tensor) -> HubSource:
        """Return what :attr:`packed` made bytes of."""
        with zipfile.ZipFile(io.BytesIO(data.numpy().tobytes())) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        own = json.loads(files.pop(_OWN))
        return cls(
            family=own["family"],
            files=files,
            tensors=tuple(Planned(**t | {"shape": tuple(t["shape"])}) for t in own["tensors"]),
            metadata=own["metadata"],
            constants={name: bytes.fromhex(value) for name, value in own["constants"].items()},
        )


def is_hub_folder(path: Path) -> bool:
    """Return whether *path* is a folder with a ``config.json``."""
    return (path / CONFIG).is_file()


def parse_config(content: bytes, *, where: object) -> dict[str, Any]:
    """Return the entries of a ``config.json``.

    Raises:
        HubFormatError: If it is no mapping in JSON.
    """
    try:
        config = json.loads(content)
    except ValueError as error:
        raise HubFormatError(f"{where}: is no JSON ({error}); get it anew") from error
    if not isinstance(config, dict):
        raise HubFormatError(f"{where}: is no mapping; get it anew")
    return config


def read_config(folder: Path) -> tuple[dict[str, Any], Family]:
    """Return the ``config.json`` of *folder* and its family.

    Raises:
        HubFormatError: If there is none, or it is damaged.
        UnknownFamilyError: If no family has its architecture.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise HubFormatError(
            f"{path}: is not there; name a folder with {CONFIG} and safetensors files"
        )
    config = parse_config(path.read_bytes(), where=path)
    return config, family_of(config, where=str(path))


def read_source(folder: Path, tensors: HubTensors) -> HubSource:
    """Return what is to be kept of *folder*.

    Args:
        folder: With ``config.json``.
        tensors: Its weights.
    """
    chosen = read_config(folder)[1]
    files = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _CARRIED and path.stat().st_size <= _LARGEST_FILE
    }
    planned = tuple(
        Planned(name=e.name, dtype=e.dtype, shape=e.shape, file=e.file.name)
        for e in tensors.entries.values()
    )
    constants = {
        name: tensors.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
        for name in tensors.entries
        if name.endswith(chosen.constants)
    }
    return HubSource(
        family=chosen.name,
        files=files,
        tensors=planned,
        metadata=tensors.metadata,
        constants=constants,
    )


def with_source(state: dict[str, Any], source: HubSource | None, *, rank: int) -> dict[str, Any]:
    """Return *state*, to which what keeps *source* in a checkpoint is added, if there is one.

    Args:
        state: Of a run, for ``Checkpointer.save``; its plain data is under ``run``.
        source: Where the weights began.
        rank: This rank.
    """
    state["hub"] = [] if source is None else [_shard(source.packed, rank)]
    state["run"]["hub_source_bytes"] = sum(shard.data.numel() for shard in state["hub"])
    return state


def shards_to_fill(run: Mapping[str, Any], *, rank: int) -> list[TensorShard]:
    """Return the pieces to load the source of a checkpoint into, none if it has none.

    Args:
        run: Plain state of the checkpoint.
        rank: This rank.
    """
    size = run.get("hub_source_bytes") or 0
    return [_shard(torch.empty(size, dtype=torch.uint8), rank)] if size else []


def source_of(shards: list[TensorShard]) -> HubSource | None:
    """Return the source that was loaded into *shards*."""
    return HubSource.from_tensor(shards[0].data) if shards else None


def family_named(source: HubSource) -> Family:
    """Return the family of *source*."""
    return family(source.family)


def _shard(data: torch.Tensor, rank: int) -> TensorShard:
    return TensorShard.whole(_KEY, data, replica_id=int(rank != 0))
