# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-ckpt``: look at checkpoints, check and convert them, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from attrs import asdict
from mb_config.errors import UserError

from mb_ckpt.__about__ import __version__
from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop.exporting import export_checkpoint
from mb_ckpt.interop.importing import import_checkpoint
from mb_ckpt.places.retention import Best
from mb_ckpt.progress_bar import ProgressBar, size
from mb_ckpt.store import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from mb_ckpt.inspection import StepInfo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if ``diff`` found any, or 2 after one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        with CheckpointStore(options.place, **_settings(options)) as store:
            return int(options.run(store, options) or 0)
    except UserError as e:
        sys.stderr.write(f"mb-ckpt: {e}\n")
        return 2
    except BrokenPipeError:  # such as by "| head"
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mb-ckpt", description="Look at checkpoints, check and convert them."
    )
    parser.add_argument("--version", action="version", version=f"mb-ckpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("ls", _list, "list the committed steps"),
        ("inspect", _inspect, "show keys, shapes, dtypes and plain data of a step"),
        ("verify", _verify, "read every byte of a step against its checksums"),
        ("prune", _prune, "delete old steps"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("place", metavar="DIR", help="directory of the run, or a URL")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        if name in ("inspect", "verify"):
            command.add_argument("--step", type=int, help="which step; the newest if left out")
        if name == "inspect":
            command.add_argument("--prefix", default="", help="only keys that begin with this")
        if name == "verify":
            command.add_argument("--all", action="store_true", help="every step")
        if name == "prune":
            _add_rules(command)
    text = "compare two steps: keys, shapes, dtypes and every value; ends with 1 if they differ"
    command = commands.add_parser("diff", help=text, description=text)
    command.add_argument("place", metavar="A", help="directory of a run, or a URL")
    command.add_argument("other", metavar="B", help="of another, or of the same")
    command.add_argument("--step", type=int, help="which step of A; the newest if left out")
    command.add_argument("--other-step", type=int, help="which step of B; the newest if left out")
    command.add_argument("--prefix", default="", help="only keys that begin with this")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_diff)
    _add_import(commands)
    _add_export(commands)
    return parser


def _add_import(commands: Any) -> None:
    text = "store a checkpoint of another format as a step"
    command = commands.add_parser("import", help=text, description=text)
    command.add_argument("source", metavar="SOURCE", help="a file or folder")
    command.add_argument("place", metavar="DEST", help="directory of the run, or a URL")
    command.add_argument(
        "--from",
        dest="format",
        default="auto",
        choices=("auto", "safetensors", "dcp", "torch_dist"),
        help="what SOURCE is; found out if left out",
    )
    command.add_argument("--step", type=int, help="number to store it under; the source's own")
    command.add_argument("--source-step", type=int, help="which of several; the newest")
    _add_names(command)
    command.add_argument("--add-prefix", default="", metavar="P", help="put before every key")
    command.add_argument(
        "--split-layers", action="store_true", help="give each layer of Megatron's keys of its own"
    )
    command.add_argument("--layout", choices=("packed", "zarr"), default="packed")
    command.add_argument("--compression", choices=("zstd",), help="none if left out")
    command.add_argument("--replace", action="store_true", help="a step that is there already")
    command.add_argument(
        "--allow-pickle", action="store_true", help="take over what a trusted SOURCE has pickled"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_import)


def _add_export(commands: Any) -> None:
    text = "write a step as a folder of another format"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("place", metavar="DIR", help="directory of the run, or a URL")
    command.add_argument("destination", metavar="DEST", help="a folder, not there or empty")
    command.add_argument("--to", required=True, choices=("safetensors", "dcp", "torch_dist"))
    command.add_argument("--step", type=int, help="which step; the newest if left out")
    _add_names(command)
    command.add_argument(
        "--strip-prefix", default="", metavar="P", help="taken off the beginning of keys"
    )
    command.add_argument("--max-shard-size", metavar="SIZE", help="of a file of safetensors; 5GB")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_export)


def _add_names(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prefix", default="", help="only keys that begin with this")
    command.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="beginnings of keys, and what to put there; may be given several times",
    )


def _add_rules(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep-last", type=int, required=True, metavar="K", help="keep the newest K steps"
    )
    command.add_argument("--keep-every", type=int, metavar="N", help="keep multiples of N")
    command.add_argument("--keep-best", metavar="METRIC", help="keep the step with the best METRIC")
    command.add_argument("--max", action="store_true", help="a higher METRIC is better")
    command.add_argument("--dry-run", action="store_true", help="only say what would go")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the store: retention to prune, files to import, else none."""
    if options.run is _import:
        return {"layout": options.layout, "compression": options.compression}
    if options.run is not _prune:
        return {}
    for name in ("keep_last", "keep_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CheckpointError(f"--{name.replace('_', '-')}={value}: give a number from 1 on")
    best = options.keep_best and Best(
        metric=options.keep_best, mode="max" if options.max else "min"
    )
    return {"keep_last": options.keep_last, "keep_every": options.keep_every, "keep_best": best}


def _prune(store: CheckpointStore, options: argparse.Namespace) -> None:
    gone = store.prune(dry_run=options.dry_run)
    left = [step for step in store.steps() if step not in gone]
    if options.json:
        _print(json.dumps({"deleted": gone, "kept": left, "dry_run": options.dry_run}))
        return
    verb = "would delete" if options.dry_run else "deleted"
    _print(f"{verb} {', '.join(map(str, gone)) or 'nothing'}; kept {', '.join(map(str, left))}")


def _list(store: CheckpointStore, options: argparse.Namespace) -> None:
    infos = [store.inspect(step) for step in store.steps()]
    if options.json:
        _print(json.dumps([_summary(info) for info in infos], indent=1))
        return
    if not infos:
        raise CheckpointError(f"no checkpoint in {store.url}: check the path")
    _print(f"{'step':>10}  {'size':>9}  {'tensors':>7}  {'ranks':>5}  committed")
    for info in infos:
        _print(
            f"{info.step:>10}  {size(info.nbytes):>9}  {len(info.tensors):>7}  "
            f"{info.world_size:>5}  {info.created}"
        )


def _inspect(store: CheckpointStore, options: argparse.Namespace) -> None:
    info = store.inspect(options.step)
    chosen = {k: t for k, t in info.tensors.items() if k.startswith(options.prefix)}
    if options.json:
        tensors = {key: asdict(tensor) for key, tensor in chosen.items()}
        data = {**_summary(info), "tensors": tensors, "plain": info.plain}
        _print(json.dumps(data, indent=1, default=repr))
        return
    written = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    _print(f"step {info.step} in {info.path}")
    _print(f"committed {info.created} by {info.world_size} rank(s) with {written}")
    width = max((len(key) for key in chosen), default=0)
    for key, tensor in sorted(chosen.items()):
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        pieces = f"  in {tensor.pieces} pieces" if tensor.pieces > 1 else ""
        _print(f"  {key:<{width}}  {tensor.dtype:<8}  {shape:<14}  {size(tensor.nbytes)}{pieces}")
    _print(f"{len(chosen)} tensors, {size(sum(t.nbytes for t in chosen.values()))}")
    if not options.prefix:
        _print(f"plain data: {info.plain}")


def _verify(store: CheckpointStore, options: argparse.Namespace) -> None:
    steps: list[int | None] = [options.step]
    if options.all:
        steps = [*store.steps()] or [None]
    results = []
    for step in steps:
        with _progress("verifying", options) as progress:
            results.append(store.verify(step, progress=progress))
    if options.json:
        _print(json.dumps([asdict(result) for result in results], indent=1))
        return
    for result in results:
        _print(
            f"step {result.step}: {result.tensors} tensors, {size(result.nbytes)}, all as written"
        )


def _diff(store: CheckpointStore, options: argparse.Namespace) -> int:
    with CheckpointStore(options.other) as other, _progress("comparing", options) as progress:
        found = store.compare(
            other,
            step=options.step,
            other_step=options.other_step,
            prefix=options.prefix,
            progress=progress,
        )
    if options.json:
        _print(json.dumps({**asdict(found), "differs": found.differs}, indent=1))
        return int(found.differs)
    for sign, keys in (("-", found.only_first), ("+", found.only_second)):
        for key in keys:
            _print(f"{sign} {key}")
    for key, (one, two) in found.kinds.items():
        _print(f"! {key}: {one}, there {two}")
    for key, change in found.changed.items():
        _print(f"~ {key}: {change.elements} elements, at most {change.largest:.3g} apart")
    if found.plain:
        _print("~ plain data")
    _print(f"{found.equal} tensors are the same bit for bit")
    return int(found.differs)


def _import(store: CheckpointStore, options: argparse.Namespace) -> None:
    with _progress("importing", options) as progress:
        done = import_checkpoint(
            options.source,
            store,
            format=options.format,
            step=options.step,
            source_step=options.source_step,
            rename=_renames(options),
            prefix=options.prefix,
            add_prefix=options.add_prefix,
            split_layers=options.split_layers,
            allow_pickle=options.allow_pickle,
            replace=options.replace,
            progress=progress,
        )
    if options.json:
        _print(json.dumps(asdict(done), indent=1))
        return
    for line in done.left_out:
        _print(f"left out {line}")
    _print(f"{done.path}: {done.tensors} tensors, {size(done.nbytes)}, from {done.format}")


def _export(store: CheckpointStore, options: argparse.Namespace) -> None:
    with _progress("exporting", options) as progress:
        done = export_checkpoint(
            store,
            options.destination,
            to=options.to,
            step=options.step,
            prefix=options.prefix,
            strip_prefix=options.strip_prefix,
            rename=_renames(options),
            max_shard_size=options.max_shard_size,
            progress=progress,
        )
    if options.json:
        _print(json.dumps(asdict(done), indent=1))
        return
    _print(f"{done.path}: step {done.step}, {done.tensors} tensors, {size(done.nbytes)}")


def _renames(options: argparse.Namespace) -> dict[str, str]:
    found = {}
    for text in options.rename:
        old, equals, new = text.partition("=")
        if not (old and equals):
            raise CheckpointError(f"--rename {text}: expected OLD=NEW, beginnings of keys")
        found[old] = new
    return found


def _progress(
    label: str, options: argparse.Namespace
) -> AbstractContextManager[Callable[[int, int], None]]:
    if options.json:
        return nullcontext(lambda *_: None)
    return ProgressBar(label)


def _summary(info: StepInfo) -> dict[str, Any]:
    return {
        "step": info.step,
        "path": info.path,
        "nbytes": info.nbytes,
        "tensors": len(info.tensors),
        "world_size": info.world_size,
        "created": info.created,
        "versions": info.versions,
    }


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
