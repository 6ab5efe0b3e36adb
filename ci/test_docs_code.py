# SPDX-License-Identifier: Apache-2.0
"""The code that README and docs show works: Python runs, commands and configurations exist.

The Python blocks of one file are one program, run in an empty directory in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml
from docs_blocks import Block, as_script, read_blocks
from mb_config import ConfigContainer
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
FILES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
PACKAGES = {path.parent.name: path for path in ROOT.glob("packages/*/pyproject.toml")}
PROJECTS = {
    name: tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    for name, path in PACKAGES.items()
}
SCRIPTS = {k: v for project in PROJECTS.values() for k, v in project.get("scripts", {}).items()}
SHELL = {"cd", "ls", "cat", "export", "git", "source", ".", "tensorboard", "kill", "echo", "curl"}
"""Commands that are not ours and need no check."""


def blocks(*languages: str) -> list[object]:
    """Return one test case a block."""
    return [
        pytest.param(block, id=f"{path.relative_to(ROOT)}:{block.line}")
        for path in FILES
        for block in read_blocks(path)
        if block.language in languages
    ]


def with_python() -> list[object]:
    """Return one test case a file that shows Python."""
    found = [path for path in FILES if any(b.language == "python" for b in read_blocks(path))]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


@pytest.mark.parametrize("path", with_python())
def test_python_blocks_run_in_order(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    script = tmp_path / f"page_{path.stem}.py"
    script.write_text(as_script(read_blocks(path)), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", script.name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": "", "MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, f"{path}: line numbers are its own\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell", "console"))
def test_commands_name_what_exists(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        code = line.removeprefix("$ ").split(" #")[0].strip()
        for command in re.split(r"&&|\|\||[;|]", code):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words = words[1:]
            if words:
                check_command(words)


def check_command(words: list[str]) -> None:
    """Fail if a command names a session, subcommand, package or file that does not exist."""
    program, rest = words[0], words[1:]
    if program in {"python", "python3"} and rest[:1] == ["-m"]:
        program, rest = rest[1], rest[2:]
    if program in SHELL or program == "venv":
        return
    if program == "nox":
        check_nox(rest)
    elif program == "pip":
        check_pip(rest)
    elif program in SCRIPTS:
        check_script(program, rest)
    elif program in {"python", "python3", "torchrun", "torch.distributed.run", "bash"}:
        scripts = [word for word in rest if word.endswith((".py", ".sh"))]
        for script in scripts[:1]:
            ours = script.startswith(("examples/", "benchmarks/", "ci/", ".ci/"))
            assert not ours or (ROOT / script).exists(), f"{script} does not exist"
    else:
        pytest.fail(f"{' '.join(words)!r}: not a command this test knows; see SHELL in {__file__}")


def check_nox(options: list[str]) -> None:
    if options[:1] and options[0] in {"-s", "--session"}:
        names = options[1 : options.index("--") if "--" in options else None]
        known = sessions()
        for name in names:
            assert name in known, f"nox has no session {name}: {sorted(known)}"


@functools.cache
def sessions() -> set[str]:
    command = [sys.executable, "-m", "nox", "--list", "-f", str(ROOT / "noxfile.py")]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    names = set(re.findall(r"^[*-] (\S+)", listed, flags=re.MULTILINE))
    return names | {name.partition("(")[0] for name in names}


def check_pip(words: list[str]) -> None:
    assert words[0] == "install", f"pip {words[0]} is not shown in documentation"
    for word in words[1:]:
        path, bracket, extras = word.partition("[")
        if path.startswith(("packages/", "./packages/")):
            name = pathlib.PurePath(path).name
            word = f"{name}{bracket}{extras}"  # noqa: PLW2901
        if word.startswith(("-", ".", "/")) or not word.startswith("mb-"):
            continue
        req = Requirement(word)
        assert req.name in PACKAGES, f"there is no package {req.name}"
        unknown = req.extras - set(PROJECTS[req.name].get("optional-dependencies", {}))
        assert not unknown, f"{req.name} has no extras {sorted(unknown)}"


def check_script(program: str, words: list[str]) -> None:
    module, function = SCRIPTS[program].split(":")
    call = f"import sys, {module} as m; sys.argv[0] = {program!r}; sys.exit(m.{function}())"
    for depth in (1, 2):
        command = [sys.executable, "-c", call, *words[:depth], "--help"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if "ACTION" not in run.stdout:  # a command with commands of its own
            break
    assert run.returncode == 0, f"{program} {words[0]} does not exist: {run.stderr}"
    for option in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
        assert option in run.stdout, f"{program} {words[0]} has no option {option}"


@pytest.mark.parametrize("block", blocks("yaml", "toml", "json"))
def test_configurations_are_valid(block: Block) -> None:
    parse = {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}[block.language]
    data = parse(block.text)
    sections = set(ConfigContainer().to_dict())
    if isinstance(data, dict) and sections & set(data):
        ConfigContainer.from_dict(data)


def test_a_block_keeps_its_line_numbers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n\n  ```python\n  x = 1\n  ```\n\n```bash\nls\n```\n```python\ny = x\n```\n")
    python, shell, second = read_blocks(path)
    assert (python.line, shell.language, second.text) == (4, "bash", "y = x\n")
    assert as_script([python, shell, second]).splitlines()[3::7] == ["x = 1", "y = x"]


def test_an_open_fence_is_an_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 1\n")
    with pytest.raises(ValueError, match=r"page\.md:1: this fence is never closed"):
        read_blocks(path)


def test_something_is_shown() -> None:
    assert with_python()
    assert blocks("bash")
