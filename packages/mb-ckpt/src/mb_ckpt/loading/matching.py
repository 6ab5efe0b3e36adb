# SPDX-License-Identifier: Apache-2.0
"""Filling a nested state from one step: what fits what, and what to do where something does not."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import evolve, field, frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.loading.packed_reader import fill, listing
from mb_ckpt.loading.zarr_reader import fill_arrays
from mb_ckpt.places.catalogue import step_name
from mb_ckpt.states import plain_tree
from mb_ckpt.states.dtensors import room_like_parameter
from mb_ckpt.states.flattening import Stateful, flatten
from mb_ckpt.states.megatron import fill_object
from mb_ckpt.states.meta_modules import materialize
from mb_ckpt.states.pieces import Piece, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store
    from mb_ckpt.states.flattening import FlatState

_CAST_BYTES = 256 << 20
"""Most bytes of stored values held beside the state while they are cast."""


@frozen(kw_only=True)
class LoadOptions:
    """How to match a state to a step; see `CheckpointStore.load`.

    ``pickles`` says whether pickles among what is wanted are run, refused, or left as they are;
    ``alone`` that there is no other rank, which might want the same bytes.
    """

    only: tuple[str, ...] | None = None
    rename: Mapping[str, str] = field(factory=dict)
    missing: Literal["error", "ignore"] = "error"
    unexpected: Literal["modules", "error", "ignore"] = "modules"
    cast: bool = False
    device: Any = None
    pickles: Literal["run", "refuse", "keep"] = "keep"
    alone: bool = False

    @property
    def runs_pickles(self) -> bool:
        """Whether stored pickles are run."""
        return self.pickles == "run"

    def wants(self, key: str) -> bool:
        """Return whether the tensor *key* of the state is to be filled."""
        return self.only is None or key.startswith(self.only)

    def stored(self, key: str) -> str:
        """Return where *key*, or a beginning of keys, is in the step; the longest prefix counts."""
        for mine in sorted(self.rename, key=len, reverse=True):
            if key.startswith(mine):
                return self.rename[mine] + key[len(mine) :]
        return key


class Loaded(dict[str, Any]):
    """The plain data of a step, without the tensors.

    Attributes:
        step: Which step.
        place: Where it was.
        filled: Keys of the state's tensors that were filled.
        missing: Keys of the state that the step does not have; they are as they were.
        unexpected: Keys of the step that nothing asked for.
    """

    def __init__(
        self,
        plain: Mapping[str, Any],
        *,
        step: int,
        place: str,
        filled: tuple[str, ...] = (),
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
    ) -> None:
        super().__init__(plain)
        self.step = step
        self.place = place
        self.filled = filled
        self.missing = missing
        self.unexpected = unexpected


def load(
    store: Store, manifest: Manifest, state: Mapping[str, Any], options: LoadOptions
) -> Loaded:
    """Fill *state* from the step of *manifest*; see `CheckpointStore.load`."""
    place = f"{store.url}/{step_name(manifest.step)}"
    with materialize(state, options.device):
        flat = flatten(state, loading=True)
        matching = _Matching(manifest, options, place)
        matching.check_pickles()
        trees = matching.trees(flat.statefuls)
        fresh = {
            key: _room(manifest, key, item, options)
            for item, tree in zip(flat.statefuls, trees, strict=True)
            for key in _tensors(tree)
        }
        objects = matching.objects(flat)
        pieces = matching.pieces(flat, {**fresh, **objects})
        unexpected = matching.unexpected(flat, pieces)
        matching.check(flat, pieces, unexpected)
    direct = [p for p in pieces if _fits(p)]
    _fill(store, manifest, direct, alone=options.alone)
    _fill_cast(store, manifest, [p for p in pieces if not _fits(p)], alone=options.alone)
    for item, tree in zip(flat.statefuls, trees, strict=True):
        if tree is not None:
            plain = plain_tree.decode(tree, fresh, unpickle=options.runs_pickles)
            item.target.load_state_dict(plain)
    for module in flat.modules:
        _load_extra(manifest, module, options)
    for thing in flat.objects:
        stored = options.stored(thing.key)
        if stored in objects:
            fill_object(thing, objects[stored])
    return Loaded(
        plain_tree.decode(manifest.tree, unpickle=options.runs_pickles) or {},
        step=manifest.step,
        place=place,
        filled=tuple(dict.fromkeys(matching.filled)),
        missing=tuple(dict.fromkeys(matching.missing)),
        unexpected=unexpected,
    )


@frozen(eq=False)
class _Matching:
    """What of a state is in a step."""

    manifest: Manifest
    options: LoadOptions
    place: str
    missing: list[str] = field(factory=list)
    wrong: list[str] = field(factory=list)
    filled: list[str] = field(factory=list)

    def check_pickles(self) -> None:
        """Refuse pickles among what is wanted, unless they are allowed."""
        if self.options.pickles != "refuse":
            return
        found = plain_tree.pickled(self.manifest.tree)
        wanted = [f"{path!r} ({name})" for path, name in found.items() if self.options.wants(path)]
        if wanted:
            raise CheckpointError(
                f"{self.place} holds pickles, which can run anything when loaded: "
                f"{listing(wanted)}; where you trust who wrote it, use allow_pickle=True, else leave "
                "them out with only="
            )

    def trees(self, statefuls: Iterable[Stateful]) -> list[Any]:
        """Return the stored plain data of objects; None for those that are left alone."""
        found = []
        for item in statefuls:
            tree = plain_tree.find(self.manifest.tree, self.options.stored(item.path))
            if not self.options.wants(item.path):
                tree = None
            elif tree is plain_tree.ABSENT or tree is None:
                if self.options.missing == "error":
                    raise CheckpointError(
                        f"{self.place} lacks {item.path!r}, the state of a "
                        f"{type(item.target).__name__}: leave it out of what is loaded"
                    )
                self.missing.append(item.path)
                tree = None
            found.append(tree)
        return found

    def objects(self, flat: FlatState) -> dict[str, torch.Tensor]:
        """Return room for the bytes of Megatron's objects, by stored key."""
        found = {}
        for item in flat.objects:
            stored = self.options.stored(item.key)
            if not self.options.wants(item.key):
                continue
            if stored in self.manifest.tensors:
                _, shape = self.manifest.tensors.kind(stored)
                found[stored] = torch.empty(shape, dtype=torch.uint8)
            else:
                self.missing.append(item.key)
        return found

    def pieces(self, flat: FlatState, fresh: Mapping[str, torch.Tensor]) -> list[Piece]:
        """Return what is to be filled: of the state, and of *fresh* tensors of objects.

        Their specs have key and dtype as in the step.
        """
        table, options, wanted = self.manifest.tensors, self.options, []
        for spec, tensor in zip(flat.specs, flat.tensors, strict=True):
            key = spec.key
            if not options.wants(key):
                continue
            stored = options.stored(key) if options.rename else key
            if stored not in table:
                self.missing.append(key)
                continue
            dtype, shape = table.kind(stored)
            if shape != spec.shape or (dtype != spec.dtype and not options.cast):
                here = f"{spec.dtype}{list(spec.shape)}"
                self.wrong.append(f"{key} is {dtype}{list(shape)} there, {here} here")
            same = stored == key and dtype == spec.dtype
            there = spec if same else evolve(spec, key=stored, dtype=dtype)
            wanted.append(Piece(there, tensor.detach()))
            self.filled.append(key)
        new = flatten(dict(fresh))
        return wanted + [Piece(s, t) for s, t in zip(new.specs, new.tensors, strict=True)]

    def unexpected(self, flat: FlatState, pieces: Iterable[Piece]) -> tuple[str, ...]:
        """Return the keys of the step that nothing asked for."""
        taken = {piece.spec.key for piece in pieces}
        left = [key for key in self.manifest.tensors if key not in taken]
        if self.options.only is not None:
            roots = tuple(self.options.stored(prefix) for prefix in self.options.only)
            left = [key for key in left if key.startswith(roots)]
        if self.options.unexpected == "modules":
            roots = tuple(self._root(module) for module in flat.modules)
            left = [key for key in left if key.startswith(roots)]
        return tuple(left)

    def check(self, flat: FlatState, pieces: Iterable[Piece], unexpected: tuple[str, ...]) -> None:
        """Refuse what does not fit, before anything is changed.

        Raises:
            CheckpointError: Names all missing and unexpected keys, or all wrong shapes and dtypes.
        """
        missing = self.missing if self.options.missing == "error" else []
        surplus = unexpected if self.options.unexpected != "ignore" else ()
        for module in flat.modules:
            self._check_module(module, missing, surplus)
        if missing:
            near = difflib.get_close_matches(missing[0], self.manifest.tensors, n=1, cutoff=0.5)
            hint = f"; nearest to the first is {near[0]!r}" if near else ""
            raise CheckpointError(
                f"{self.place} lacks {listing(missing)}{hint}; load with the model that was saved, "
                "ask for fewer keys, or use missing='ignore'"
            )
        if surplus:
            raise CheckpointError(
                f"nothing asks for {listing(list(surplus))} of {self.place}: ask for it, or use "
                "unexpected='ignore'"
            )
        if self.wrong:
            raise CheckpointError(f"{self.place} does not fit: {listing(self.wrong)}")
        for piece in pieces:
            stored, here = getattr(torch, piece.spec.dtype), piece.data.dtype
            if stored.is_complex and not here.is_complex:
                raise CheckpointError(
                    f"{self.place} does not fit: {piece.spec.key} is {piece.spec.dtype} and cannot "
                    f"be cast to {here}"
                )

    def _check_module(self, module: Stateful, missing: list[str], surplus: tuple[str, ...]) -> None:
        """Refuse a module that is not the one that was saved: neither less nor more."""
        prefix, root = f"{module.path}." if module.path else "", self._root(module)
        lacks = sorted(key for key in missing if key.startswith(prefix))
        more = sorted(key for key in surplus if key.startswith(root))
        parts = []
        if lacks:
            parts.append(f"{self.place} lacks {listing(lacks)}")
        if more:
            parts.append(f"the module lacks {listing(more)}")
        if parts:
            name = module.path or "state"
            raise CheckpointError(f"{name!r} is not the module that was saved: {'; '.join(parts)}")

    def _root(self, module: Stateful) -> str:
        return self.options.stored(f"{module.path}." if module.path else "")


def _tensors(tree: Any) -> list[str]:
    return [] if tree is None else plain_tree.tensor_keys(tree)


def _fits(piece: Piece) -> bool:
    return dtype_name(piece.data.dtype) == piece.spec.dtype


def _fill(store: Store, manifest: Manifest, pieces: list[Piece], *, alone: bool) -> None:
    if manifest.layout == "zarr":
        fill_arrays(store, manifest, pieces)
    else:
        fill(store, manifest, pieces, alone=alone)


def _fill_cast(store: Store, manifest: Manifest, wanted: list[Piece], *, alone: bool) -> None:
    """Fill tensors of other dtypes than stored, by way of a limited number of them as stored."""
    while wanted:
        batch: list[tuple[Piece, Piece]] = []
        nbytes = 0
        while wanted and (not batch or nbytes < _CAST_BYTES):
            piece = wanted.pop()
            room = torch.empty(piece.data.shape, dtype=getattr(torch, piece.spec.dtype))
            nbytes += room.numel() * room.element_size()
            batch.append((piece, Piece(piece.spec, room)))
        _fill(store, manifest, [stored for _, stored in batch], alone=alone)
        for piece, stored in batch:
            piece.data.copy_(stored.data)


def _room(manifest: Manifest, key: str, item: Stateful, options: LoadOptions) -> Any:
    """Return a tensor to fill for the stored tensor *key* of an object's state."""
    dtype, shape = manifest.tensors.kind(key)
    name = key[len(options.stored(item.path)) + 1 :]
    room = room_like_parameter(item.target, name, shape, dtype)
    return torch.empty(shape, dtype=getattr(torch, dtype)) if room is None else room


def _load_extra(manifest: Manifest, module: Stateful, options: LoadOptions) -> None:
    """Give a module the plain data of its state (``get_extra_state``); its tensors are filled."""
    if not options.wants(f"{module.path}."):
        return
    tree = plain_tree.find(manifest.tree, options.stored(module.path))
    plain = (
        None
        if tree is plain_tree.ABSENT
        else plain_tree.decode(tree, unpickle=options.runs_pickles)
    )
    if plain:
        module.target.load_state_dict({**module.target.state_dict(), **plain})
