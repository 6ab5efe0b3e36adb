# SPDX-License-Identifier: Apache-2.0
"""Errors meant for the person who runs a job: one clear message, no traceback needed."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen


class UserError(Exception):
    """Something the user can put right; its message says what and how.

    Every package derives its own errors from this one, so that a command line can print the message
    alone and exit with code 2.
    """


@frozen(kw_only=True)
class Violation:
    """One rule a configuration breaks.

    Attributes:
        field: Dotted name, such as ``"model.num_attention_heads"``.
        value: The offending value as text.
        rule: What must hold.
        remedy: What to do.
    """

    field: str
    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}={self.value}: {self.rule}; {self.remedy}"


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; carries every violation found.

    Attributes:
        violations: All broken rules, in the order of the sections.
    """

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)

    @classmethod
    def from_violations(cls, violations: Sequence[Violation]) -> ConfigError:
        """Return one error that lists every violation."""
        lines = [str(v) for v in violations]
        if len(lines) == 1:
            return cls(lines[0], violations)
        head = f"{len(lines)} problems in the configuration:"
        return cls("\n  ".join([head, *lines]), violations)


class PluginError(UserError, LookupError):
    """A named plugin is missing, claimed twice, or its package is not installed."""
