# SPDX-License-Identifier: Apache-2.0
"""Every task of this repository; `nox --list` tells what each session does.

Plain `nox` runs all tests: one session a package, in an environment that holds the package's wheel,
what it declares and nothing else, with the linters, the type checker and the code of the
documentation beside them.

Environment variables:
    MB_TORCH_INDEX_URL: Package index that torch is installed from. Unset: on Linux without a GPU
        PyTorch's own index of CPU builds where it answers, else pip's default. Empty: the default.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from typing import Any

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = {p.parent.name: p.parent for p in sorted(ROOT.glob("packages/*/pyproject.toml"))}
SOURCES = {name: path / "src" / name.replace("-", "_") for name, path in PACKAGES.items()}
METADATA: dict[str, dict[str, Any]] = {
    name: nox.project.load_toml(path / "pyproject.toml") for name, path in PACKAGES.items()
}
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
COMPAT_MEGATRON = "0.19.2"
CODE = ("packages", "tests", "ci", "benchmarks", "examples", "noxfile.py")
ENV = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
}
"""Of tests: ranks share few cores, and neither a model hub nor a source tree may help."""


def find_python() -> str | None:
    """Return the interpreter of the sessions, None for the one that nox runs on.

    Python 3.11 is preferred where it works: megatron-core 0.16.1 is for it, and an index without
    CPU builds of torch for newer versions is the rule.
    """
    if sys.version_info[:2] == (3, 11):
        return None
    name = shutil.which("python3.11")
    probe = [name or "", "-c", "import sys, ssl, zlib; sys.exit(sys.version_info[:2] != (3, 11))"]
    if name and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return "3.11"
    return None


PYTHON = find_python()
BUILT: set[str] = set()
ENGINE_TESTS = PACKAGES["mb-engine"] / "tests"
MODES = ENGINE_TESTS / "parity"
ROOMS = {"data": ("data",), "model": ("model", "attention"), "plan": ("plan", "recipes")}
"""Folders of the engine's tests that have a session of their own, so that each stays short."""
TOGETHER = {
    "checkpoints": ("checkpoints", "examples"),
    "huggingface": ("bridge", "recipes", "finetune"),
    "layouts": ("reshard", "object_stores"),
}
"""Folders of tests of several packages, by the session that runs them."""
TOOLS = {"checkpoints": "accelerate", "layouts": "moto[server]"}
per_package = nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
per_room = nox.parametrize("room", list(ROOMS), ids=list(ROOMS))
per_part = nox.parametrize("part", list(TOGETHER), ids=list(TOGETHER))
per_megatron = nox.parametrize(
    "newest", [nox.param(False, id="pinned"), nox.param(True, id=COMPAT_MEGATRON)]
)

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"  # its environments have pip, those of uv do not
nox.options.error_on_external_run = True
nox.options.sessions = [
    "lint",
    "typing",
    *(f"alone({name})" for name in PACKAGES),
    *(f"tests({name})" for name in PACKAGES),
    "engine",
    "modes",
    "together",
    "docs_code",
]


# What to install


@functools.cache
def torch_index() -> str | None:
    """Return the index to take torch from, None for pip's default."""
    if (url := os.environ.get("MB_TORCH_INDEX_URL")) is not None:
        return url or None
    if not sys.platform.startswith("linux") or has_gpu():
        return None  # elsewhere the default index has CPU builds; with a GPU its CUDA build is due
    try:
        with urllib.request.urlopen(f"{CPU_TORCH_INDEX}/torch/", timeout=3):
            return CPU_TORCH_INDEX
    except (urllib.error.URLError, OSError):
        return None


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU whose driver answers."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    return b"GPU" in subprocess.run([smi, "-L"], capture_output=True, check=False).stdout


def pinned(name: str) -> str:
    """Return the line of constraints.txt that pins *name*."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def wants(requirement: str, *, group: str = "") -> tuple[dict[str, set[str]], list[str]]:
    """Return the packages of this repository that *requirement* stands for, and its test tools.

    Args:
        requirement: A package of this repository with extras, such as ``"mb-engine[ckpt]"``.
        group: A dependency group of it to add.

    Returns:
        Extras by package name, over everything declared; and the group's other requirements.
    """
    local: dict[str, set[str]] = {}
    others: list[str] = []
    first = Requirement(requirement)
    group_lines = nox.project.dependency_groups(METADATA[first.name], group) if group else ()
    queue = [requirement, *group_lines]
    while queue:
        req = Requirement(text := queue.pop(0))
        name = canonicalize_name(req.name)
        if name not in PACKAGES:
            if text in group_lines:
                others.append(text)
            continue
        project = METADATA[name]["project"]
        extras = project.get("optional-dependencies", {})
        if name not in local:
            queue += project["dependencies"]
        for extra in req.extras - local.setdefault(name, set()):
            local[name].add(extra)
            queue += extras[extra]
    return local, others


def wheel(session: nox.Session, name: str) -> pathlib.Path:
    """Return the wheel of *name*, built once in one run of nox."""
    out = pathlib.Path(session.cache_dir) / "wheels" / name
    if name not in BUILT:
        shutil.rmtree(out, ignore_errors=True)
        pip = ("python", "-m", "pip", "wheel", "--quiet", "--no-deps")
        session.run_install(*pip, "-w", str(out), str(PACKAGES[name]))
        BUILT.add(name)
    return next(out.glob("*.whl"))


def install(session: nox.Session, *requirements: str, group: str = "", tools: str = "") -> None:
    """Install packages of this repository as wheels, with what they declare.

    Args:
        session: Where to.
        requirements: Packages of this repository with extras.
        group: A dependency group of each to add.
        tools: Further requirements, separated by blanks.
    """
    local: dict[str, set[str]] = {}
    others = tools.split()
    for requirement in requirements:
        found, more = wants(requirement, group=group)
        others += more
        for name, extras in found.items():
            local.setdefault(name, set()).update(extras)
    if any("torch" in needs(name) for name in local):
        install_torch(session)
    files = [f"{wheel(session, n)}[{','.join(sorted(x))}]" for n, x in sorted(local.items())]
    files = [file.removesuffix("[]") for file in files]
    # A reused environment would keep an older wheel of the same version.
    session.run_install("python", "-m", "pip", "uninstall", "-yq", *PACKAGES, silent=True)
    session.install("--no-compile", "-c", str(CONSTRAINTS), *files, *others)


def needs(name: str) -> set[str]:
    """Return the names of what the package *name* requires."""
    return {Requirement(text).name for text in METADATA[name]["project"]["dependencies"]}


def install_torch(session: nox.Session) -> None:
    """Install the pinned torch from the index that fits the machine."""
    index = torch_index()
    # --no-deps: that index serves torch alone; the next call of pip brings what torch requires.
    # --no-compile: byte-compiling all of torch takes longer than unpacking it.
    options = ["--no-deps", "--no-compile", *(["--index-url", index] if index else [])]
    session.install(*options, pinned("torch"))


# Checks without tests


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style, import rules between packages, spelling and sizes."""
    session.install("-c", str(CONSTRAINTS), "ruff", "import-linter", "codespell")
    paths = [path for path in CODE if (ROOT / path).exists()]
    session.run("ruff", "check", *paths)
    session.run("ruff", "format", "--check", *paths)
    sources = os.pathsep.join(str(path.parent) for path in SOURCES.values())
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})
    session.run("codespell")
    session.run("python", str(ROOT / "ci" / "sizes.py"))


@nox.session(python=PYTHON)
def typing(session: nox.Session) -> None:
    """Check types with mypy, strictly."""
    install_torch(session)
    tools = ("attrs", "cattrs", "crc32c", "mypy", "numpy", "packaging", "types-PyYAML", "torch")
    session.install("--no-compile", "-c", str(CONSTRAINTS), *tools)
    session.run("mypy", *(session.posargs or [str(path) for path in SOURCES.values()]))


# Tests


@nox.session(python=PYTHON)
@per_package
def tests(session: nox.Session, package: str) -> None:
    """Run the tests of one package: its wheel, what it declares and its test tools, no more."""
    install(session, package, group="test")
    elsewhere = [MODES, *(ENGINE_TESTS / name for names in ROOMS.values() for name in names)]
    ignored = [f"--ignore={path}" for path in elsewhere]  # sessions of their own run those
    session.run("pytest", *ignored, str(PACKAGES[package] / "tests"), *session.posargs, env=ENV)


@nox.session(python=PYTHON)
@per_room
def engine(session: nox.Session, room: str) -> None:
    """Run the engine's tests of one of its rooms, in the environment of tests(mb-engine)."""
    install(session, "mb-engine", group="test")
    folders = [str(ENGINE_TESTS / name) for name in ROOMS[room]]
    session.run("pytest", *folders, *session.posargs, env=ENV)


@nox.session(python=PYTHON, reuse_venv=False)
@per_package
def alone(session: nox.Session, package: str) -> None:
    """Import one package where only its wheel and what it declares are installed."""
    install(session, package)
    session.run("python", str(ROOT / "ci" / "alone.py"), package, *PACKAGES, env=ENV)
    shutil.rmtree(session.virtualenv.location)  # torch takes 0.8 GB in each


@nox.session(python=PYTHON)
@per_part
def together(session: nox.Session, part: str) -> None:
    """Run the tests that need several packages, with all of them installed."""
    all_folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    if left := all_folders - {name for names in TOGETHER.values() for name in names}:
        session.error(f"no session runs tests/{sorted(left)}: name them in TOGETHER")
    install(session, "mb-engine[all]", tools=f"pytest {TOOLS.get(part, '')}")
    folders = [str(ROOT / "tests" / name) for name in TOGETHER[part]]
    session.run("pytest", *folders, *session.posargs, env=ENV)


@nox.session(python=PYTHON)
def docs_code(session: nox.Session) -> None:
    """Run the Python of README and docs, and check the commands and configurations they show."""
    install(session, "mb-engine[all]", tools="pytest nox")
    env = ENV | {"OMP_NUM_THREADS": "2"}
    session.run("pytest", str(ROOT / "ci" / "test_docs_code.py"), *session.posargs, env=env)


def newest_megatron(session: nox.Session) -> dict[str, str]:
    """Return the environment in which the newest supported megatron-core is imported.

    That wheel declares Python 3.12, but ``megatron.core`` itself runs on 3.11 as well.
    """
    tmp = pathlib.Path(session.create_tmp())
    session.run(
        *("python", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--python-version", "3.12", "-d", str(tmp), f"megatron-core=={COMPAT_MEGATRON}"),
    )
    with zipfile.ZipFile(next(tmp.glob("megatron_core-*.whl"))) as archive:
        archive.extractall(tmp / "megatron")
    env = ENV | {"PYTHONPATH": str(tmp / "megatron")}
    # Imported as it is, it asks for triton on a machine without CUDA.
    show = "import importlib.metadata as m, importlib.util as u; print(m.version('megatron-core'),"
    show += " u.find_spec('megatron.core').origin)"
    session.run("python", "-c", show, env=env)
    return env


@nox.session(python=PYTHON)
def compat(session: nox.Session) -> None:
    """Run the engine's tests against the sources of the newest supported megatron-core.

    The mode table has sessions of its own for that: ``modes`` and ``parity``.
    """
    install(session, "mb-engine", group="test")
    env = newest_megatron(session)
    session.run("pytest", f"--ignore={MODES}", str(ENGINE_TESTS), *session.posargs, env=env)


@nox.session(python=PYTHON)
@per_megatron
def modes(session: nox.Session, newest: bool) -> None:
    """Compare the short mode table with one rank, on each supported megatron-core."""
    install(session, "mb-engine", group="test")
    env = newest_megatron(session) if newest else ENV
    session.run("pytest", str(MODES), *session.posargs, env=env)


@nox.session(python=PYTHON)
@per_megatron
def parity(session: nox.Session, newest: bool) -> None:
    """Compare every mode with one rank and write what was measured; see docs/parity.md."""
    install(session, "mb-engine", group="test")
    env = newest_megatron(session) if newest else ENV
    name = f"parity-megatron-core-{COMPAT_MEGATRON}.md" if newest else "parity.md"
    results = ROOT / "benchmarks" / "results" / name
    script = str(MODES / "mode_report.py")
    session.run("python", "-Wignore", script, str(results), *session.posargs, env=env)


@nox.session(venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """Run the tests that need CUDA, with the torch and Transformer Engine already installed."""
    session.install("-c", str(CONSTRAINTS), "pytest", "hypothesis")
    session.install("--no-deps", *(str(wheel(session, name)) for name in PACKAGES))
    session.run("pytest", "-m", "gpu", "packages", "tests", *session.posargs)


# The main jobs


@nox.session(python=PYTHON)
def quickstart(session: nox.Session) -> None:
    """Train a small GPT on the text of the Python documentation; minutes on two CPU cores."""
    install(session, "mb-engine[ckpt,logging]")
    session.run("python", str(ROOT / "examples" / "quickstart.py"), *session.posargs)


@nox.session(python=PYTHON, name="finetune-demo")
def finetune_demo(session: nox.Session) -> None:
    """Fine-tune a Hugging Face folder on chats and export it; two minutes on two CPU cores."""
    install(session, "mb-engine[all]")
    env = {"HF_HUB_OFFLINE": "1"}  # all it needs is made on the spot
    session.run("python", str(ROOT / "examples" / "finetune.py"), *session.posargs, env=env)


@nox.session(python=PYTHON)
def bench(session: nox.Session) -> None:
    """Run the benchmarks, or those named: nox -s bench -- train_cpu."""
    install(session, *PACKAGES, "mb-engine[ckpt,hf]", group="test")
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    for script in [s for s in scripts if not session.posargs or s.stem in session.posargs]:
        session.run("python", str(script))


# Release


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Build sdist and wheel of each package into dist/ and check what is in them."""
    session.install("-c", str(CONSTRAINTS), "build", "hatchling")
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    for path in PACKAGES.values():
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(out), str(path))
    session.run("python", str(ROOT / "ci" / "check_dist.py"), str(out))


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """Build the documentation into site/."""
    session.install("-c", str(CONSTRAINTS), "mkdocs-material", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict", *session.posargs)
