# SPDX-License-Identifier: Apache-2.0
"""What ``inject`` did, as a value that prints as a table."""

from __future__ import annotations

import re

from attrs import frozen


@frozen(kw_only=True)
class Adapted:
    """One adapted linear.

    Attributes:
        name: Of the module.
        shape: ``(out, in)`` of its weight.
        rank: Inner width of its adapter.
        parameters: Trainable parameters added.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


@frozen(kw_only=True)
class Report:
    """What will train; ``print`` shows it as a table, layers that are alike in one row.

    Attributes:
        adapted: The adapted linears, in the order of the model.
        trainable: Parameters that train.
        total: Parameters of the model, adapters included.
    """

    adapted: tuple[Adapted, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        groups: dict[tuple[str, str, int], list[Adapted]] = {}
        for row in self.adapted:
            name = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", row.name)
            shape = " x ".join(str(n) for n in row.shape)
            groups.setdefault((name, shape, row.rank), []).append(row)
        rows = [("module", "count", "out x in", "rank", "trainable")]
        for (name, shape, rank), found in groups.items():
            size = sum(row.parameters for row in found)
            rows.append((name, str(len(found)), shape, str(rank), f"{size:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))])
            for row in rows
        ]
        share = 100 * self.trainable / self.total
        lines.append(f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)")
        return "\n".join(lines)
