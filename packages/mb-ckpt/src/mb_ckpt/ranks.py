# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a job tell each other about checkpoints, over a gloo group of their own."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from attrs import frozen

from mb_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@frozen
class Ranks:
    """This rank among those that save together.

    Attributes:
        rank: Within the group.
        size: Of the group.
        group: gloo process group that nothing else uses; None for one rank.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def beside(cls, process_group: Any, *, timeout_s: float) -> Ranks:
        """Return a new group of the ranks of *process_group* (None: all); a collective call."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        if len(members) == 1:
            return cls()
        group = dist.new_group(
            members,
            backend="gloo",
            timeout=timedelta(seconds=timeout_s),
            use_local_synchronization=len(members) < dist.get_world_size(),
        )
        return cls(dist.get_group_rank(group, dist.get_rank()), len(members), group)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and only this rank's own elsewhere."""
        if self.group is None:
            return [value]
        received: list[Any] | None = [None] * self.size if self.rank == 0 else None
        self._call(dist.gather_object, value, received, dst=self._first())
        return [value] if received is None else received

    def broadcast(self, value: T) -> T:
        """Return rank 0's value."""
        if self.group is None:
            return value
        box = [value]
        self._call(dist.broadcast_object_list, box, src=self._first())
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return whether *flag* is set on any rank."""
        return self.broadcast(any(self.gather(flag)))

    def from_first(self, call: Callable[[], T]) -> T:
        """Return what *call* returns on rank 0.

        Raises:
            Exception: On every rank what *call* raised on rank 0.
        """
        error: Exception | None = None
        value: T | None = None
        if self.rank == 0:
            try:
                value = call()
            except Exception as e:  # noqa: BLE001  # the other ranks are waiting to hear of it
                error = e
        kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
        value, failure = self.broadcast((value, None if error is None else (kind, str(error))))
        if error is not None:
            raise error
        if failure is not None:
            raise failure[0](failure[1])
        return value  # type: ignore[return-value]  # None only if call returns None

    def close(self) -> None:
        """Free the group; a collective call."""
        # torch names a group of some ranks by their hash alone: one that is made after another was
        # destroyed would meet that one's addresses. So those last until torch takes all down.
        if self.group is not None and dist.is_initialized() and self.size == dist.get_world_size():
            dist.destroy_process_group(self.group)

    def _first(self) -> int:
        return int(dist.get_global_rank(self.group, 0))

    def _call(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, group=self.group, **kwargs)
        except (RuntimeError, ValueError) as e:
            reason = str(e).strip().split("\n", maxsplit=1)[0]
            raise CheckpointError(
                f"rank {self.rank} lost contact with the other ranks of the checkpoint group "
                f"({reason}): no checkpoint was committed; restart the job from the last one"
            ) from e
