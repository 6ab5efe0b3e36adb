# SPDX-License-Identifier: Apache-2.0
"""Random configurations for hypothesis, made from the annotations and bounds of the fields."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import attrs
from hypothesis import strategies as st
from mb_config import ConfigContainer, LoRA, MixedPrecisionConfig, MockDatasetConfig
from mb_config._types import hints, is_union
from mb_config.provenance import put

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
TRICKY_STRINGS = [
    "",
    "null",
    "~",
    "true",
    "no",
    "3",
    "3e-4",
    "1_000",
    "0x1f",
    "1:30",
    "2024-01-01",
    "- a",
    "#b",
    "a: b",
    "'",
    '"',
    "\\",
    "\n",
    "\t",
    " lead",
    "é\x85\u2028\ufeff",
    "\x7f",
    ".inf",
    "=",
    "<<",
    "%",
]
TRICKY = st.sampled_from(TRICKY_STRINGS)
STRINGS = TEXT | TRICKY


def _bounded(bounds: dict[str, float], *, integer: bool) -> Any:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if integer:
        low = None if low is None else int(low) + ("gt" in bounds)
        return st.integers(low, high if high is None else int(high) - ("lt" in bounds))
    return st.floats(
        low,
        high,
        exclude_min="gt" in bounds,
        exclude_max="lt" in bounds,
        allow_nan=False,
        allow_infinity=False,
    )


def values(hint: Any, bounds: dict[str, float], *, nulls: bool = True) -> Any:
    """Return a strategy for values of *hint*; without nulls inside lists and mappings if asked."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return st.sampled_from(args)
    if is_union(hint):
        return st.one_of(*(values(a, bounds, nulls=nulls) for a in args))
    if get_origin(hint) is list:
        return st.lists(values(args[0], bounds, nulls=nulls), max_size=3)
    if get_origin(hint) is tuple:
        return st.tuples(*(values(a, bounds, nulls=nulls) for a in args))
    if get_origin(hint) is dict:
        return st.dictionaries(STRINGS, values(args[1], {}, nulls=nulls), max_size=3)
    if hint is Any:
        floats = st.floats(allow_nan=False, allow_infinity=False)
        leaves = st.booleans() | st.integers() | floats | STRINGS
        leaves = leaves | st.none() if nulls else leaves
        return st.recursive(
            leaves,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
            max_leaves=5,
        )
    simple = {
        int: _bounded(bounds, integer=True),
        float: _bounded(bounds, integer=False),
        bool: st.booleans(),
        str: STRINGS,
        type(None): st.none(),
    }
    return simple[hint]


def fields_of(config: ConfigContainer) -> list[tuple[str, Any, dict[str, float]]]:
    """Return ``(path, hint, bounds)`` of every field of every section."""
    found = []
    for name, hint in hints(ConfigContainer).items():
        section = getattr(config, name)
        if not attrs.has(type(section)):
            if name == "env_vars":
                found.append((name, hint, {}))
            continue
        for field in attrs.fields(type(section)):
            bounds = field.metadata.get("bounds", {})
            found.append((f"{name}.{field.name}", hints(type(section))[field.name], bounds))
    return found


@st.composite
def containers(draw: Any, *, nulls: bool = True) -> ConfigContainer:
    """Draw a container with some fields of some sections set at random."""
    config = ConfigContainer()
    if draw(st.booleans()):
        config.peft = LoRA()
    if draw(st.booleans()):
        config.dataset = MockDatasetConfig()
    config.mixed_precision = draw(
        st.none() | st.sampled_from(["bf16_mixed"]) | st.builds(MixedPrecisionConfig)
    )
    chosen = draw(st.lists(st.sampled_from(fields_of(config)), max_size=12))
    for path, hint, bounds in chosen:
        put(config, path, draw(values(hint, bounds, nulls=nulls)))
    return config
