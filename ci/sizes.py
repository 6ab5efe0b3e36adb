# SPDX-License-Identifier: Apache-2.0
"""Check the hard size limits of the packages' sources; `--report` prints medians as well."""

from __future__ import annotations

import ast
import pathlib
import statistics
import sys

MODULE_LINES = 400
FUNCTION_LINES = 60
INIT_LINES = 60
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "base.py", "misc.py"}
ROOT = pathlib.Path(__file__).parents[1]


def check(path: pathlib.Path) -> tuple[list[str], int, list[int]]:
    """Return the problems of one module, its lines, and the lines of each function."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    lines = len(text.splitlines())
    limit = INIT_LINES if path.name == "__init__.py" else MODULE_LINES
    problems = [f"{name}: {lines} lines, at most {limit}"] if lines > limit else []
    if path.name in FORBIDDEN_NAMES:
        problems.append(f"{name}: a module is named for what it holds, not {path.name}")
    functions = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        functions.append(length)
        if length > FUNCTION_LINES:
            where = f"{name}:{node.lineno}"
            problems.append(f"{where}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
    return problems, lines, functions


def main() -> int:
    """Return 1 if a limit is broken."""
    modules, functions, problems = [], [], []
    for path in sorted(ROOT.glob("packages/*/src/**/*.py")):
        found, lines, lengths = check(path)
        problems += found
        modules.append(lines)
        functions += lengths
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    if "--report" in sys.argv:
        print(f"modules: {len(modules)}, median {statistics.median(modules):.0f} lines")
        print(f"functions: {len(functions)}, median {statistics.median(functions):.0f} lines")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
