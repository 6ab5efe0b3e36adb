# SPDX-License-Identifier: Apache-2.0
"""Check one package where only its wheel and its requirements are installed.

Usage: python ci/alone.py mb-x ALL PACKAGES...

Every module of the package must import, no other package of this repository may be importable but
`mb_config`, importing the package must not load a sibling, and a package that promises to be light
must not have loaded a heavy library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pathlib
import pkgutil
import sys
import time

LIGHT = {"mb-config", "mb-logging"}
HEAVY = ("torch", "numpy", "megatron", "tensorstore", "transformers", "matplotlib", "tensorboard")
EVERY_MODULE = {"mb-config", "mb-ckpt", "mb-peft", "mb-distill"}
"""Packages without optional parts, whose modules must all import."""


def main(package: str, siblings: list[str]) -> int:
    """Return the exit code of the check of *package*."""
    name = package.replace("-", "_")
    start = time.perf_counter()
    module = importlib.import_module(name)
    took = time.perf_counter() - start
    problems = []
    if "site-packages" not in pathlib.Path(module.__file__ or "").parts:
        problems.append(f"{name} came from {module.__file__}, not from its wheel")
    if package in LIGHT:
        problems += [f"{heavy} was loaded by import {name}" for heavy in HEAVY if loaded(heavy)]
    others = {s.replace("-", "_") for s in siblings} - {name, "mb_config"}
    problems += [f"{other} is installed too" for other in sorted(others) if found(other)]
    if package in EVERY_MODULE:
        for info in pkgutil.walk_packages(module.__path__, f"{name}."):
            importlib.import_module(info.name)
    problems += [f"{other} was loaded by {name}" for other in sorted(others) if loaded(other)]
    if not (pathlib.Path(module.__file__ or "").parent / "py.typed").exists():
        problems.append(f"{name} has no py.typed")
    if importlib.metadata.version(package) != module.__version__:
        problems.append(f"{name}.__version__ is not the version of the wheel")
    for problem in problems:
        print(f"{package}: {problem}", file=sys.stderr)
    print(f"{package} {module.__version__}: import {name} took {took * 1000:.0f} ms")
    return bool(problems)


def found(name: str) -> bool:
    """Return whether the module *name* could be imported."""
    return importlib.util.find_spec(name) is not None


def loaded(name: str) -> bool:
    """Return whether the module *name* is imported."""
    return name in sys.modules


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
