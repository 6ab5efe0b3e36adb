# SPDX-License-Identifier: Apache-2.0
"""The folders of runs of Megatron-LM, Megatron Bridge and NeMo: which checkpoint, and what is beside it."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop.restricted_pickle import LEFT_OUT, read_object, to_state

if TYPE_CHECKING:
    from pathlib import Path

_LOG = logging.getLogger("mb_ckpt")
_TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"^(?:iter_|global_step|step[_-]?)(\d+)$|(?:^|-)step=(\d+)(?:-|$)")
_WEIGHTS = "weights"
_CONFIG = "run_config.yaml"
_TRAIN_STATE = "train_state.pt"


def resolve(path: Path, step: int | None) -> tuple[Path, int | None, dict[str, Any]]:
    """Return the folder of one checkpoint, its step if known, and the plain data beside it.

    Args:
        path: A checkpoint, or the folder of a run: with ``iter_0000100`` and the like, or ``release``,
            and perhaps ``latest_checkpointed_iteration.txt``.
        step: Which one; None for the one that the tracker names, else the newest that is whole.

    Returns:
        The folder; the step; and ``run_config`` (of ``run_config.yaml``) and ``train_state`` (of
        ``train_state.pt``) where they are.

    Raises:
        CheckpointError: If there is no such checkpoint, or what is beside it is damaged.
    """
    inside = _inside(path)
    if inside is not None:
        own = _step_of(path.name)
        if step is not None and step != own:
            raise CheckpointError(
                f"source_step={step}, but {path} is one checkpoint: leave it out, or give the folder "
                "of the run"
            )
        return inside, own, _beside(path)
    whole = {}
    for entry in sorted(path.iterdir()):
        number, folder = _step_of(entry.name), _inside(entry) if entry.is_dir() else None
        if folder is not None and (number is not None or entry.name == "release"):
            whole[number] = (entry, folder)
    if not whole:
        raise CheckpointError(
            f"{path} holds no whole checkpoint: looked for folders such as iter_0000100 or release "
            "with .metadata in them"
        )
    chosen = _chosen(path, step, whole)
    entry, folder = whole[chosen]
    return folder, chosen, _beside(entry)


def _chosen(path: Path, step: int | None, whole: dict[int | None, Any]) -> int | None:
    known = ", ".join("release" if n is None else str(n) for n in whole)
    if step is not None:
        if step not in whole:
            raise CheckpointError(f"step {step} is not in {path}, there is {known}")
        return step
    tracker = path / _TRACKER
    newest = max((n for n in whole if n is not None), default=None)
    if not tracker.is_file():
        return newest
    text = tracker.read_text(encoding="utf-8").strip()
    named = None if text == "release" else int(text) if text.isdecimal() else -1
    if named in whole:
        return named
    _LOG.warning("%s says %r, which is not whole; taking %s", tracker, text[:40], newest)
    return newest


def _inside(folder: Path) -> Path | None:
    """Return where the tensors of a checkpoint are; None if *folder* is none, or not whole."""
    for place in (folder, folder / _WEIGHTS):
        if (place / ".metadata").is_file():
            return place
    return None


def _step_of(name: str) -> int | None:
    found = _STEP.search(name)
    return None if found is None else int(found[1] or found[2])


def _beside(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    config, state = folder / _CONFIG, folder / _TRAIN_STATE
    if config.is_file():
        plain["run_config"] = _read_yaml(config)
    if state.is_file():
        left_out: list[str] = []
        found = read_object(state, str(state), allow_pickle=False)
        value = to_state(found, "train_state", left_out, allow_pickle=False)
        if value is not LEFT_OUT:
            plain["train_state"] = value
        for line in left_out:
            _LOG.warning("%s: left out %s", state, line)
    return plain


def _read_yaml(path: Path) -> Any:
    """Return plain data of a YAML file; objects that it names are the data they were made of."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Makes nothing but plain data."""

    def plain(loader: Any, suffix: str, node: Any) -> Any:  # noqa: ARG001
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    Loader.add_multi_constructor("!", plain)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", plain)
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.load(file, Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} is no YAML: {e}") from e
    found: list[str] = []
    return to_state(data, "run_config", found, allow_pickle=False)
