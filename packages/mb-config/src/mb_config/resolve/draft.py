# SPDX-License-Identifier: Apache-2.0
"""A configuration while it is being resolved: derived values and violations are noted here."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from attrs import define, field

from mb_config._types import show
from mb_config.errors import ConfigError, Violation
from mb_config.provenance import Origin, get, put, same

if TYPE_CHECKING:
    from mb_config.container import ConfigContainer


@define(kw_only=True)
class Draft:
    """A copy of the user's configuration and what was found out about it.

    Attributes:
        config: The copy; rules change this one.
        world_size: Ranks of the job.
        violations: Broken rules so far.
    """

    config: ConfigContainer
    world_size: int
    violations: list[Violation] = field(factory=list)

    def withdraw(self) -> None:
        """Put values that an earlier finalize derived back to what they were before it.

        A derived value that has been changed since is the user's and stays.
        """
        origins = self.config._origins  # noqa: SLF001 - this package is the container's own
        for path, origin in list(origins.items()):
            if origin.kind != "derived":
                continue
            del origins[path]
            try:
                if same(get(self.config, path), origin.value):
                    put(self.config, path, copy.deepcopy(origin.base))
            except ConfigError:
                continue  # the section is gone

    def derive(self, path: str, value: Any, because: str) -> None:
        """Set *path* to *value* and remember why and what was there."""
        base = get(self.config, path)
        if same(base, value):
            base = None
        put(self.config, path, value)
        self.config._origins[path] = Origin(  # noqa: SLF001
            kind="derived", value=copy.deepcopy(value), text=because, base=base
        )

    def fill(self, path: str, value: Any, because: str) -> None:
        """Derive *path* if it is None."""
        if get(self.config, path) is None:
            self.derive(path, value, because)

    def fix(self, path: str, value: Any, because: str) -> None:
        """Derive a field that nobody sets; another value there is a violation."""
        now = get(self.config, path)
        if now is not None and now != value:
            self.deny(path, f"is derived and would be {show(value)} ({because})", "leave it out")
            return
        self.derive(path, value, because)

    def deny(self, path: str, rule: str, remedy: str) -> None:
        """Note that *path* breaks *rule*."""
        value = show(get(self.config, path))
        self.violations.append(Violation(field=path, value=value, rule=rule, remedy=remedy))

    def require(self, holds: object, path: str, rule: str, remedy: str) -> bool:
        """Note a violation unless *holds*; return whether it does."""
        if not holds:
            self.deny(path, rule, remedy)
        return bool(holds)
