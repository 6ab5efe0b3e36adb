# SPDX-License-Identifier: Apache-2.0
"""Fixed-length training samples cut from one long row of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import field, frozen

from mb_engine.data import hashing
from mb_engine.data.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OFFSET = 2  # keeps the keys of offsets apart from those of shuffles


def stacked(windows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return next-token training samples of *windows*.

    Args:
        windows: Token ids ``[B, S + 1]``.

    Returns:
        int64 ``[B, S]``: ``tokens``, ``labels`` (each the token that follows) and ``position_ids``;
        float32 ``[B, S]``: ``loss_mask``, all ones.
    """
    batch, length = windows.shape[0], windows.shape[1] - 1
    return {
        "tokens": windows[:, :-1].astype(np.int64),
        "labels": windows[:, 1:].astype(np.int64),
        "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
        "loss_mask": np.ones((batch, length), dtype=np.float32),
    }


@frozen(kw_only=True, eq=False)
class TokenWindows:
    """A map-style data set: consecutive windows of ``seq_length`` tokens, read at random.

    Window ``i`` of epoch ``e`` starts at ``offset(e) + i * seq_length`` and is one token longer, so
    that every token but the first is predicted once an epoch. With ``random_offset`` each epoch
    after the first is shifted by an amount drawn from ``(seed, epoch)``, and there is one window
    fewer, so that all epochs have the same length.

    Attributes:
        tokens: 1-D unsigned integers, possibly a memory map.
        seq_length: Tokens a sample, S.
        random_offset: Shift the windows each epoch.
        seed: Of the shifts.
        name: For messages.

    Raises:
        DataError: If there are not enough tokens for one window.
    """

    tokens: NDArray[Any] = field(repr=False)
    seq_length: int
    random_offset: bool = False
    seed: int = 1234
    name: str = "dataset.path"

    def __attrs_post_init__(self) -> None:
        if len(self.tokens) < self.seq_length + 1:
            raise DataError(
                f"{self.name} has {len(self.tokens)} tokens, fewer than dataset.seq_length + 1 ="
                f" {self.seq_length + 1}; add text, or lower the sequence length or another share"
                " of dataset.split"
            )

    def __len__(self) -> int:
        whole = (len(self.tokens) - 1) // self.seq_length
        return whole - 1 if self.random_offset and whole > 1 else whole

    def offset(self, epoch: int) -> int:
        """Return by how many tokens the windows of *epoch* are shifted."""
        slack = len(self.tokens) - 1 - len(self) * self.seq_length
        if not self.random_offset or epoch == 0:
            return 0
        return hashing.key(self.seed, epoch, _OFFSET) % (min(slack, self.seq_length - 1) + 1)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """Return sample *index* of the first epoch; see :func:`stacked`, without the first axis."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch = self.get_batch(np.array([index % len(self)]), np.zeros(1, dtype=np.int64))
        return {key: values[0] for key, values in batch.items()}

    def get_batch(
        self, index: NDArray[np.int64], epoch: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return the samples at *index* of *epoch* (both ``[B]``); see :func:`stacked`."""
        starts = index * self.seq_length
        if self.random_offset:
            epochs, where = np.unique(epoch, return_inverse=True)
            starts = starts + np.array([self.offset(int(e)) for e in epochs])[where]
        return stacked(self.tokens[starts[:, None] + np.arange(self.seq_length + 1)])
