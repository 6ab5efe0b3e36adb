# SPDX-License-Identifier: Apache-2.0
"""Check what is inside the built sdists and wheels: python ci/check_dist.py dist/."""

from __future__ import annotations

import configparser
import email.parser
import pathlib
import sys
import tarfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).parents[1]


def check_wheel(path: pathlib.Path, pyproject: dict, version: str) -> list[str]:  # type: ignore[type-arg]
    """Return what is wrong with a wheel."""
    project = pyproject["project"]
    module = project["name"].replace("-", "_")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        info = f"{module}-{version}.dist-info"
        problems = [
            f"has no {name}"
            for name in (f"{module}/py.typed", f"{module}/__about__.py", f"{info}/licenses/LICENSE")
            if name not in names
        ]
        problems += [f"holds {n}" for n in names if not n.startswith((f"{module}/", f"{info}/"))]
        metadata = email.parser.Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        for key, value in (("Version", version), ("License-Expression", "Apache-2.0")):
            if metadata[key] != value:
                problems.append(f"{key} is {metadata[key]}, not {value}")
        if len(metadata.get_payload()) < 200:
            problems.append("its long description, the README, is missing or a stub")
        declared = dict(project.get("entry-points", {}))
        if "scripts" in project:
            declared["console_scripts"] = project["scripts"]
        parser = configparser.ConfigParser()
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        if f"{info}/entry_points.txt" in names:
            parser.read_string(archive.read(f"{info}/entry_points.txt").decode())
        if {s: dict(parser[s]) for s in parser.sections()} != declared:
            problems.append("entry points differ from pyproject.toml")
        for group in declared.values():
            files = (target.split(":")[0].replace(".", "/") for target in group.values())
            problems += [
                f"entry point names {f}, which is not there"
                for f in files
                if not {f"{f}.py", f"{f}/__init__.py"} & set(names)
            ]
    return [f"{path.name}: {problem}" for problem in problems]


def check_sdist(path: pathlib.Path, name: str, version: str) -> list[str]:
    """Return what is wrong with an sdist."""
    top = f"{name.replace('-', '_')}-{version}"
    with tarfile.open(path) as archive:
        names = archive.getnames()
    wanted = ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO")
    problems = [f"has no {n}" for n in wanted if f"{top}/{n}" not in names]
    if not any(n.startswith(f"{top}/tests/test_") for n in names):
        problems.append("holds no tests")
    return [f"{path.name}: {problem}" for problem in problems]


def main(dist: pathlib.Path) -> int:
    """Return 1 if an archive is missing or wrong."""
    problems = []
    for package in sorted(p.parent for p in ROOT.glob("packages/*/pyproject.toml")):
        pyproject = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
        name = package.name
        module = name.replace("-", "_")
        about = (package / "src" / module / "__about__.py").read_text(encoding="utf-8")
        version = about.split('__version__ = "')[1].split('"')[0]
        changelog = (package / "CHANGELOG.md").read_text(encoding="utf-8")
        heading = next(line for line in changelog.splitlines() if line.startswith("## "))
        if version not in heading:
            problems.append(f"{name}: CHANGELOG.md begins with '{heading}', not {version}")
        wheel = dist / f"{module}-{version}-py3-none-any.whl"
        sdist = dist / f"{module}-{version}.tar.gz"
        missing = [f"{f.name}: not built" for f in (wheel, sdist) if not f.exists()]
        problems += missing or [
            *check_wheel(wheel, pyproject, version),
            *check_sdist(sdist, name, version),
        ]
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    print(f"{len(list(dist.iterdir()))} archives checked, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
