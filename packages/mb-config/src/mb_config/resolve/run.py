# SPDX-License-Identifier: Apache-2.0
"""The order in which a configuration is resolved."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from mb_config._types import fits
from mb_config.errors import ConfigError, Violation
from mb_config.provenance import leaves
from mb_config.resolve import (
    architecture,
    attention,
    batches,
    data,
    experts,
    fsdp,
    memory,
    optimizer,
    outputs,
    overlap,
    parallel,
    precision,
    schedules,
)
from mb_config.resolve.draft import Draft

if TYPE_CHECKING:
    from mb_config.container import ConfigContainer


def finalize(config: ConfigContainer, world_size: int) -> ConfigContainer:
    """Return a resolved copy of *config* for *world_size* ranks.

    Raises:
        ConfigError: With every broken rule.
    """
    if not fits(world_size, int) or world_size < 1:
        rule = Violation(
            field="world_size",
            value=repr(world_size),
            rule="must be an int of at least 1",
            remedy="give the number of ranks",
        )
        raise ConfigError.from_violations([rule])
    draft = Draft(config=copy.deepcopy(config), world_size=world_size)
    draft.withdraw()
    attention.choose_layers(draft)
    precision.resolve(draft)
    architecture.resolve(draft)
    parallel.resolve(draft)
    attention.resolve(draft)
    experts.resolve(draft)
    ramp = batches.resolve(draft)
    fsdp.resolve(draft)
    optimizer.resolve(draft)
    schedules.resolve(draft, ramp)
    data.resolve(draft)
    memory.resolve(draft)
    precision.check_sizes(draft)
    overlap.resolve(draft)
    outputs.resolve(draft)
    if draft.violations:
        raise ConfigError.from_violations(_in_order(draft))
    return draft.config


def _in_order(draft: Draft) -> list[Violation]:
    """Return the violations, each once, in the order of the fields."""
    order = {path: place for place, (path, _) in enumerate(leaves(draft.config))}
    unique = {(v.field, v.rule): v for v in draft.violations}
    return sorted(unique.values(), key=lambda v: order.get(v.field, len(order)))
