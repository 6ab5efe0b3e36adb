# SPDX-License-Identifier: Apache-2.0
"""Synthetic samples that a model can learn, computed when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, in_

from mb_engine.data import hashing
from mb_engine.data.windows import stacked

if TYPE_CHECKING:
    from numpy.typing import NDArray

PATTERNS = ("counting", "random")
_STRIDES = 4


@frozen(kw_only=True)
class MockDataset:
    """A map-style data set of sequences that a seed and an index determine.

    Attributes:
        num_samples: Length.
        seq_length: Tokens a sample, S.
        vocab_size: Ids are below it.
        pattern: ``"counting"``: token ``t`` is ``(start + stride * t) mod vocab_size`` with a
            random start and a stride of 1 to 4, so that two tokens tell all that follow and the
            loss can fall to nearly zero. ``"random"``: independent uniform tokens, of which nothing
            can be learned: the loss stays at ``log(vocab_size)``.
        seed: Of the samples.
    """

    num_samples: int = field(validator=ge(1))
    seq_length: int = field(validator=ge(1))
    vocab_size: int = field(validator=ge(2))
    pattern: str = field(default="counting", validator=in_(PATTERNS))
    seed: int = 1234

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """Return sample *index*: int64 and float32 arrays ``[S]``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch = self.get_batch(np.array([index % len(self)]), np.zeros(1, dtype=np.int64))
        return {key: values[0] for key, values in batch.items()}

    def get_batch(
        self, index: NDArray[np.int64], epoch: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return the samples at *index* ``[B]``, the same in every *epoch*, stacked."""
        del epoch
        place = np.arange(self.seq_length + 1, dtype=np.int64)
        if self.pattern == "random":
            counters = index[:, None] * (self.seq_length + 1) + place
            return stacked(hashing.hash_index(counters, self.seed) % np.uint64(self.vocab_size))
        bits = hashing.hash_index(index, self.seed)
        stride = (bits % np.uint64(_STRIDES)).astype(np.int64) + 1
        start = (bits >> np.uint64(8)).astype(np.int64) % self.vocab_size
        return stacked((start[:, None] + stride[:, None] * place) % self.vocab_size)
