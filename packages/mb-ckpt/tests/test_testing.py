# SPDX-License-Identifier: Apache-2.0
"""Our own stores and checkpointers pass the kits, and broken ones do not."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from mb_ckpt import CheckpointStore
from mb_ckpt.places.stores import FileStore, open_store
from mb_ckpt.plugin import make_checkpointer
from mb_ckpt.testing import CheckpointerKit, StoreKit
from mb_config import CheckpointConfig
from mb_config.records import ProcessLayout


@pytest.fixture(autouse=True)
def fresh(request, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []
    if request.instance is not None:
        request.instance.made = made
    yield
    for one in made:
        one.close()


class TestFileStore(StoreKit):
    def make_store(self):
        return FileStore(Path(tempfile.mkdtemp()) / "run")


class TestMemoryStore(StoreKit):
    def make_store(self):
        return open_store(f"memory://{tempfile.mkdtemp()}")


class TestCheckpointStore(CheckpointerKit):
    def make_checkpointer(self):
        self.made.append(CheckpointStore(f"memory://{tempfile.mkdtemp()}"))
        return self.made[-1]


class TestPlugin(CheckpointerKit):
    def make_checkpointer(self):
        self.made.append(
            make_checkpointer(CheckpointConfig(save=tempfile.mkdtemp()), ProcessLayout())
        )
        return self.made[-1]


class Forgetful(FileStore):
    """Does not replace."""

    def publish(self, path, data):
        if not (self.root / path).exists():
            super().publish(path, data)


class Greedy(FileStore):
    """Removes neighbours as well."""

    def remove(self, path):
        super().remove(path.split("/")[0])


@pytest.mark.parametrize(
    ("store", "test"),
    [(Forgetful, "test_replaces_a_file"), (Greedy, "test_removes_files_and_trees")],
)
def test_the_kit_catches_a_broken_store(store, test):
    class Kit(StoreKit):
        def make_store(self):
            return store(Path(tempfile.mkdtemp()))

    with pytest.raises(AssertionError):
        getattr(Kit(), test)()


class Late(CheckpointStore):
    """Stages only when it is asked for the result."""

    def save(self, step, state):
        saved = super().save

        class Handle:
            def wait_staged(self):
                pass

            def result(self, timeout=None):
                saved(step, state).result(timeout)

            def done(self):
                return True

        return Handle()


class Lax(CheckpointStore):
    """Loads what it has and says nothing of the rest."""

    def load(self, state, step=None):
        stored = self.inspect(step).tensors
        return super().load({k: v for k, v in state.items() if k in stored}, step)


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (Late, "test_a_save_owns_what_was_there_when_it_was_staged"),
        (Lax, "test_names_what_does_not_fit"),
    ],
)
def test_the_kit_catches_a_broken_checkpointer(kind, test, tmp_path):
    with kind(tmp_path) as broken:

        class Kit(CheckpointerKit):
            def make_checkpointer(self):
                return broken

        with pytest.raises(AssertionError):
            getattr(Kit(), test)()
