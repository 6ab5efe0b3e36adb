# SPDX-License-Identifier: Apache-2.0
"""Pickles of others, read without running them.

An unpickler calls whatever a pickle names. Here only what torch itself needs to build tensors, and the
records of ``torch.distributed.checkpoint``, are called; for every other class or function stands an
`Inert` object, which remembers what it was given and does nothing.
"""

from __future__ import annotations

import _compat_pickle
import enum
import io
import pickle
from collections import OrderedDict
from dataclasses import is_dataclass
from pathlib import PurePosixPath, PureWindowsPath
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from mb_ckpt.errors import CheckpointError
from mb_ckpt.states.plain_tree import SCALARS, Pickled

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata


class Inert:
    """Stands for an object of a class that was not called.

    Attributes:
        name: Module and name of the class, set in a subclass each.
        arguments: What it would have been called with.
        state: What it would have been given.
    """

    name = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an entry of what derives from ``dict``, and forget it."""

    def append(self, value: Any) -> None:
        """Take an item of what derives from ``list``, and forget it."""

    def extend(self, values: Any) -> None:
        """Take items of what derives from ``list``, and forget them."""


_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_DCP}.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    f"{_DCP}.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch._utils": (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    ),
    "torch": ("Size", "Tensor", "device"),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("TypedStorage", "UntypedStorage"),
    "numpy": ("dtype", "ndarray"),
    "_codecs": ("encode",),
    "builtins": ("bytearray", "complex", "dict", "frozenset", "list", "range", "set", "slice", "tuple"),
}  # fmt: skip


def _member(owner: Any, name: str) -> Any:
    """Return a member of an enum: some Pythons pickle one as ``getattr(class, name)``."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum):
        return owner[name]
    if isinstance(owner, type) and issubclass(owner, Inert):
        return owner(name)
    return type("getattr", (Inert,), {"name": "builtins.getattr"})(owner, name)


_MULTIARRAY = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
_OTHERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, name): PurePosixPath for module in ("pathlib", "pathlib._local")
       for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")},
    **{(module, name): PureWindowsPath for module in ("pathlib", "pathlib._local")
       for name in ("WindowsPath", "PureWindowsPath")},
    **{(f"numpy.{core}.multiarray", name): resolve_name(f"{_MULTIARRAY}:{name}")
       for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    ("_io", "BytesIO"): io.BytesIO,
    ("builtins", "getattr"): _member,
}  # fmt: skip
_BUILT = frozenset((OrderedDict, io.BytesIO, np.ndarray, torch.nn.Parameter))
"""What has a state of its own beside `Inert` objects, DCP's records and numpy's dtypes."""
_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


# The one that is written in Python: that in C has no hook for what `load_build` refuses.
_Slow: Any = pickle._Unpickler  # noqa: SLF001


class _Unpickler(_Slow):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = dict(_Slow.dispatch)

    def load_build(self) -> None:
        """Give an object its state; never a class, a function or the member of an enum."""
        kind = type(self.stack[-2])
        if not (issubclass(kind, (Inert, np.dtype)) or kind in _BUILT or is_dataclass(kind)):
            raise pickle.UnpicklingError(f"it would change a {kind.__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """Return what may be called under that name, or an inert class."""
        # What torch.save writes has the names of Python 2, as pickle's protocol 2 does.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        other = _OTHERS.get((module, name))
        if other is not None:
            return other
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, _TORCH_CONSTANTS):
                return found
        if module == "numpy.dtypes" and name.endswith("DType"):
            return super().find_class(module, name)
        return type(name, (Inert,), {"name": f"{module}.{name}"})


# What torch.load asks of a pickle module; it derives from Unpickler and overrides persistent_load.
_MODULE = SimpleNamespace(
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
    loads=lambda data, **options: _Unpickler(io.BytesIO(data), **options).load(),
    __name__="mb_ckpt.interop.restricted_pickle",
)


def read_metadata(path: Path) -> Metadata:
    """Return the ``.metadata`` of a folder of ``torch.distributed.checkpoint``.

    Raises:
        CheckpointError: If it is damaged, or no such record.
        OSError: If it cannot be read.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    with path.open("rb") as file:
        try:
            found = _Unpickler(file).load()
        except Exception as e:
            raise CheckpointError(f"{path} is damaged, it cannot be unpickled: {e}") from e
    if not isinstance(found, Metadata):
        kind = found.name if isinstance(found, Inert) else type(found).__name__
        raise CheckpointError(f"{path} holds a {kind}, expected the metadata of {_DCP}")
    return found


def read_object(file: Any, where: str, *, allow_pickle: bool) -> Any:
    """Return what ``torch.save`` has put into *file*, tensors on the CPU.

    Args:
        file: A path, or an open binary file.
        where: Its name, for messages.
        allow_pickle: Whether to run what pickles say. Else classes that are unknown here become
            `Inert`.

    Raises:
        CheckpointError: If it is damaged.
    """
    module: Any = pickle if allow_pickle else _MODULE
    try:
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)
    except Exception as e:
        raise CheckpointError(f"{where} is damaged or no file of torch.save: {e}") from e


def to_state(value: Any, path: str, left_out: list[str], *, allow_pickle: bool) -> Any:
    """Return *value* as what a store takes: mappings, sequences, tensors and plain data.

    Args:
        value: Of `read_object`.
        path: Where it is, for messages.
        left_out: Lines about what has no place in a state are added to this.
        allow_pickle: Whether other objects become pickles; else they are left out.
    """
    return _Converter(left_out, allow_pickle).convert(value, path)


LEFT_OUT: Any = object()
"""What `to_state` returns for what it leaves out."""


class _Converter:
    def __init__(self, left_out: list[str], allow_pickle: bool) -> None:
        self._left_out = left_out
        self._allow_pickle = allow_pickle

    def convert(self, value: Any, path: str) -> Any:  # noqa: PLR0911  # one return a kind
        if isinstance(value, dict):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)):
            items = [self.convert(item, f"{path}.{i}") for i, item in enumerate(value)]
            kept = [None if item is LEFT_OUT else item for item in items]
            return tuple(kept) if isinstance(value, tuple) else kept
        if isinstance(value, torch.Tensor) and type(value) in {torch.Tensor, torch.nn.Parameter}:
            return value.detach().contiguous()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return np.array(value, dtype=value.dtype.newbyteorder("="))
        if isinstance(value, np.generic):
            return self.convert(value.item(), path)
        if isinstance(value, _TORCH_CONSTANTS):
            return str(value)
        if isinstance(value, (torch.device, PurePosixPath, PureWindowsPath)):
            return str(value)
        if isinstance(value, Inert):
            return self._inert(value, path)
        if type(value) in SCALARS:
            return value
        return self._other(value, path)

    def _mapping(self, value: dict[Any, Any], path: str) -> Any:
        out = {}
        for key, item in value.items():
            name = f"{path}.{key}" if path else str(key)
            if type(key) not in SCALARS or isinstance(key, Pickled):
                self._leave(name, f"its key is a {_name(key)}")
                continue
            converted = self.convert(item, name)
            if converted is not LEFT_OUT:
                out[key] = converted
        return out

    def _inert(self, value: Inert, path: str) -> Any:
        if value.name == "argparse.Namespace" or value.name.endswith(".SimpleNamespace"):
            return self._mapping(value.state or {}, path)
        # The name of a class, not of a function.
        named = value.name.rpartition(".")[2][:1].isupper()
        if named and len(value.arguments) == 1 and type(value.arguments[0]) in SCALARS:
            return value.arguments[0]
        return self._leave(path, f"it is a {value.name}")

    def _other(self, value: Any, path: str) -> Any:
        kind = _name(value)
        if kind == "argparse.Namespace":
            return self._mapping(vars(value), path)
        if self._allow_pickle:
            return Pickled.of(value, path)
        return self._leave(path, f"it is a {kind}")

    def _leave(self, path: str, why: str) -> Any:
        self._left_out.append(f"{path}: {why}")
        return LEFT_OUT


def _name(value: Any) -> str:
    if isinstance(value, Inert):
        return value.name
    return f"{type(value).__module__}.{type(value).__qualname__}"
