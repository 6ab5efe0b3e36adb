# SPDX-License-Identifier: Apache-2.0
"""Kits that show whether an implementation keeps the promises of `Store` or of a checkpointer.

Subclass one in a test module under a name that begins with ``Test`` and give it the one method it
asks for; pytest then runs the tests it inherits. They need no pytest themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from mb_config.records import TensorShard

from mb_ckpt.format.tensorstore_io import get

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_ckpt.interfaces import Store


class Checkpointer(Protocol):
    """What a training engine asks of checkpoints."""

    def save(self, step: int, state: Mapping[str, Any]) -> Any:
        """Save; return a handle with ``wait_staged()``, ``done()`` and ``result(timeout)``."""
        ...

    def load(self, state: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """Fill tensors in place; return the plain data."""
        ...

    def steps(self) -> list[int]:
        """Return the committed steps, ascending."""
        ...


class StoreKit(ABC):
    """Tests of a `Store`."""

    @abstractmethod
    def make_store(self) -> Store:
        """Return a store that nothing has been put in; another one at each call."""

    def test_is_empty_at_first(self) -> None:
        """Nothing is anywhere, and asking for it is no error."""
        store = self.make_store()
        assert store.names("") == []
        assert store.names("a/b") == []

    def test_publishes_whole_files(self) -> None:
        """What was published is read back through the kvstore spec, at any depth."""
        store = self.make_store()
        store.publish("a/b/c.json", b"one")
        store.publish("a/d", b"")
        assert get(store.kvstore, "a/b/c.json") == b"one"
        assert get(store.kvstore, "a/d") == b""
        assert get(store.kvstore, "a/e") is None

    def test_replaces_a_file(self) -> None:
        """The second publication of a name wins, and leaves nothing beside it."""
        store = self.make_store()
        store.publish("a/b", b"first and longer")
        store.publish("a/b", b"second")
        assert get(store.kvstore, "a/b") == b"second"
        assert store.names("a") == ["b"]

    def test_names_what_is_directly_below(self) -> None:
        """Files and directories, sorted, one level, not those that only begin alike."""
        store = self.make_store()
        for path in ("z", "a/y", "a/b/c", "a/b/d", "ab/c"):
            store.publish(path, b"x")
        assert store.names("") == ["a", "ab", "z"]
        assert store.names("a") == ["b", "y"]
        assert store.names("a/b") == ["c", "d"]

    def test_lists_directories_and_all_files_below_one(self) -> None:
        """``tree`` is two levels without files of the root, ``files`` is all levels."""
        store = self.make_store()
        for path in ("z", "a/y", "a/b/c", "a/b/d", "ab/c"):
            store.publish(path, b"x")
        store.settle("a")
        assert store.tree() == {"a": ["b", "y"], "ab": ["c"]}
        assert store.files("a") == ["b/c", "b/d", "y"]
        assert store.files("none") == []

    def test_a_claim_stands_until_it_is_given_back(self) -> None:
        """Claiming makes no step, and the next writer can claim when the first one is done."""
        store = self.make_store()
        for _ in range(2):
            claim = store.claim()
            claim.check()
            claim.release()
        assert store.tree() == {}

    def test_removes_files_and_trees(self) -> None:
        """A file, a tree, or nothing; neighbours stay."""
        store = self.make_store()
        for path in ("a/b/c", "a/b/d", "a/e", "ab"):
            store.publish(path, b"x")
        store.remove("a/b")
        assert store.names("a") == ["e"]
        store.remove("a/e")
        store.remove("a/none")
        store.remove("none/at/all")
        assert get(store.kvstore, "a/e") is None
        assert get(store.kvstore, "ab") == b"x"

    def test_keeps_the_old_file_when_a_path_cannot_be_published(self) -> None:
        """A name below a file cannot be; where a store allows it, the file still stays whole."""
        store = self.make_store()
        store.publish("a", b"file")
        with suppress(OSError):
            store.publish("a/b", b"below a file")
        assert get(store.kvstore, "a") == b"file"


class CheckpointerKit(ABC):
    """Tests of the shape a training engine relies on, on one rank."""

    @abstractmethod
    def make_checkpointer(self) -> Checkpointer:
        """Return a checkpointer of a place that holds nothing; another one at each call."""

    def test_has_no_steps_at_first(self) -> None:
        """An empty place has no steps, and loading from it is the user's error."""
        checkpointer = self.make_checkpointer()
        assert checkpointer.steps() == []
        _refuses("no checkpoint", checkpointer, {"w": torch.zeros(1)})

    def test_gives_back_tensors_in_place_and_plain_data(self) -> None:
        """Tensors, parameters and plain data of a nested state."""
        checkpointer = self.make_checkpointer()
        weight = torch.nn.Parameter(torch.randn(3, 4))
        state = {"a": {"w": weight, "lr": 0.1}, "none": None, "list": [1, {"x": "y"}]}
        checkpointer.save(7, state).result()
        room = torch.nn.Parameter(torch.zeros(3, 4))
        plain = checkpointer.load({"a": {"w": room}})
        assert torch.equal(room, weight)
        assert plain == {"a": {"lr": 0.1}, "none": None, "list": [1, {"x": "y"}]}

    def test_lists_committed_steps_and_loads_any(self) -> None:
        """Ascending, whatever the order of saving; the newest unless a step is named."""
        checkpointer, tensor = self.make_checkpointer(), torch.zeros(2)
        for step in (2, 10, 9):
            checkpointer.save(step, {"w": torch.full((2,), float(step))}).result()
        assert checkpointer.steps() == [2, 9, 10]
        checkpointer.load({"w": tensor})
        assert tensor.tolist() == [10, 10]
        checkpointer.load({"w": tensor}, 2)
        assert tensor.tolist() == [2, 2]

    def test_a_save_owns_what_was_there_when_it_was_staged(self) -> None:
        """Tensors may change once ``wait_staged`` has returned."""
        checkpointer, tensor = self.make_checkpointer(), torch.ones(1000)
        handle = checkpointer.save(1, {"w": tensor})
        handle.wait_staged()
        tensor.zero_()
        handle.result(60.0)
        assert handle.done()
        checkpointer.load({"w": tensor})
        assert (tensor == 1).all()

    def test_shards_are_stored_by_key_and_load_into_other_pieces(self) -> None:
        """Boxes and flat ranges, and only the pieces with ``replica_id=0``."""
        checkpointer, whole = self.make_checkpointer(), torch.arange(24.0).reshape(4, 6)
        rows = [_shard(whole[:3], 0), _shard(whole[3:], 3), _shard(whole[3:] * 0, 3, replica_id=1)]
        checkpointer.save(1, {"anywhere": {"w": rows}}).result()
        room = torch.zeros(10)
        wanted = TensorShard(
            key="w",
            data=room,
            global_shape=(4, 6),
            offset=(1, 0),
            local_shape=(3, 6),
            dtype="float32",
            flat_range=(4, 14),
        )
        checkpointer.load({"elsewhere": [wanted]})
        assert torch.equal(room, whole.flatten()[10:20])

    def test_names_what_does_not_fit(self) -> None:
        """Missing keys, other shapes and other dtypes are named; the state stays as it was."""
        checkpointer, good = self.make_checkpointer(), torch.zeros(2)
        checkpointer.save(1, {"w": torch.ones(2), "v": torch.ones(3)}).result()
        _refuses("absent", checkpointer, {"w": good, "absent": torch.zeros(1)})
        _refuses("v", checkpointer, {"w": good, "v": torch.zeros(4)})
        _refuses("v", checkpointer, {"w": good, "v": torch.zeros(3, dtype=torch.float64)})
        assert (good == 0).all()


def _shard(data: torch.Tensor, row: int, *, replica_id: int = 0) -> TensorShard:
    return TensorShard(
        key="w",
        data=data.clone(),
        global_shape=(4, 6),
        offset=(row, 0),
        local_shape=tuple(data.shape),
        dtype="float32",
        replica_id=replica_id,
    )


def _refuses(text: str, checkpointer: Checkpointer, state: Mapping[str, Any]) -> None:
    said = None
    try:
        checkpointer.load(state)
    except Exception as error:  # noqa: BLE001  # any error class of the implementer's
        said = str(error)
    assert said is not None, f"loading {sorted(state)} was not refused"
    assert text in said, f"the error does not say {text!r}: {said}"
