# SPDX-License-Identifier: Apache-2.0
"""The short rows of the mode table; ``nox -s parity`` runs all of them."""

from __future__ import annotations

import collections

import pytest
from mb_engine.testing import tiny_config
from mode_report import measure
from mode_rows import BASE, SP, TABLE, TP2, Row
from mode_training import Run

SHORT = [row for row in TABLE if row.short]
STEPS = 12  # of the table's 20: what is wrong shows by then
MASKS = ("model.attention_dropout=0.2", "model.hidden_dropout=0.2")
# With dropout on the attention, whose masks differ between ranks; no run on one rank is like it.
DRIFT = {
    "TP2": Run((*BASE, *TP2, *MASKS)),
    "TP2 + SP": Run((*BASE, *TP2, *SP, *MASKS)),
}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def measured():
    others = [(2, case) for case in DRIFT.values()]
    outcomes, seen = measure(SHORT, others=others, steps=STEPS, timeout_s=280)
    return {outcome.row.name: outcome for outcome in outcomes}, seen


@pytest.mark.parametrize("name", [row.name for row in SHORT])
def test_a_mode_gives_the_losses_of_one_rank(measured, name):
    outcome = measured[0][name]
    assert outcome.complaint() == ""


@pytest.mark.parametrize("name", DRIFT)
def test_what_tensor_parallel_ranks_share_stays_the_same_on_them(measured, name):
    """The replicated norms must not drift."""
    seen = measured[1]
    first, second = seen[2, DRIFT[name]]
    assert first["replicated"] == second["replicated"]
    assert first["losses"] == second["losses"]
    plain = seen[1, Run(BASE)][0]["losses"]
    assert abs(first["losses"][5] - plain[5]) > 1e-3, "dropout must have been on"


def test_a_complaint_names_what_is_wrong(measured):
    """Two different models are not within any bound: what compares them can fail."""
    from mode_report import difference

    seen = measured[1]
    (one,) = seen[1, Run(BASE)]
    other = next(ranks for key, ranks in seen.items() if key[0] == 1 and key[1] != Run(BASE))
    assert not difference(other, one).within(SHORT[0].bound)
    assert difference([one], one).within(Row(name="", kind="", ranks=1).bound)
    broken = {**one, "losses": [*one["losses"][:-1], float("nan")]}
    assert not difference([broken], one).within(SHORT[0].bound)


def test_the_table_names_each_mode_once_and_covers_every_kind():
    names = collections.Counter((row.kind, row.name) for row in TABLE)
    assert max(names.values()) == 1
    assert len(TABLE) >= 40
    assert {row.kind for row in TABLE} == {row.kind for row in SHORT}
    assert {1, 2, 4} == {row.ranks for row in TABLE}


def test_samples_of_a_packed_row_do_not_see_each_other(measured):
    """Or the packed rows would compare the same as the others."""
    seen = measured[1]
    row = next(row for row in SHORT if row.packed)
    (packed,) = seen[1, Run(row.reference, packed=True)]
    (apart,) = seen[1, Run(BASE)]
    assert abs(packed["losses"][10] - apart["losses"][10]) > 1e-3


def test_every_row_is_a_valid_configuration():
    for row in TABLE:
        tiny_config(*row.overrides).finalize(row.ranks)
