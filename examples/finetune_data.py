# SPDX-License-Identifier: Apache-2.0
"""Questions and answers about Python's standard library, from its own documentation strings.

The first paragraph of each is the answer. The same Python makes the same pairs in the same order.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs
codeop collections collections.abc colorsys compileall concurrent.futures configparser contextlib
contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis doctest email.header
email.message email.policy email.utils enum errno filecmp fileinput fnmatch fractions ftplib
functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser
http.client http.cookiejar http.cookies http.server imaplib importlib.metadata importlib.resources
importlib.util inspect io ipaddress itertools json keyword linecache locale logging logging.handlers
lzma mailbox math mimetypes mmap modulefinder multiprocessing.pool netrc numbers operator optparse os
os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats
py_compile pyclbr queue quopri random re reprlib runpy sched secrets select selectors shelve shlex
shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess
symtable sys sysconfig tarfile tempfile textwrap threading time timeit token tokenize tomllib trace
traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request
urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.headers xml.dom.minidom
xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zlib zoneinfo
"""
HELD_OUT = 12
"""One pair in so many is not trained on."""
_LENGTHS = (20, 320)
_SIGNATURE = re.compile(r"^\w[\w.]*\(|->")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def pairs() -> list[tuple[str, str]]:
    """Return questions with their answers, shuffled with a fixed seed; no answer is there twice."""
    found: dict[str, str] = {}
    for question, text in _documented():
        answer = _first_paragraph(text)
        if answer is not None:
            found.setdefault(answer, question)
    made = [(question, answer) for answer, question in found.items()]
    random.Random(0).shuffle(made)
    return made


def write_chats(folder: Path, *, most: int | None = None) -> dict[str, Path]:
    """Write ``train.jsonl`` and ``heldout.jsonl`` as chats.

    Args:
        folder: Made if it is not there.
        most: Pairs in all; None for as many as there are.

    Returns:
        The two files by the name of the set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[str]] = {"train": [], "heldout": []}
    for i, (question, answer) in enumerate(pairs()[:most]):
        turns = [("user", question), ("assistant", answer)]
        chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
        sets["train" if i % HELD_OUT else "heldout"].append(json.dumps(chat) + "\n")
    files = {name: folder / f"{name}.jsonl" for name in sets}
    for name, file in files.items():
        file.write_text("".join(sets[name]), encoding="utf-8")
    return files


def _documented() -> Iterator[tuple[str, str | None]]:
    """Yield a question about each public thing of the modules, and its documentation."""
    for name in MODULES.split():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # not on this platform
                continue
        yield f"What is the module {name} for?", module.__doc__
        for member, value in _public(module):
            yield from _about(f"{name}.{member}", value)


def _about(name: str, value: Any) -> Iterator[tuple[str, str | None]]:
    if inspect.isclass(value):
        yield f"What is {name}?", value.__doc__
        for member, method in _public(value):
            if inspect.isroutine(method):
                yield f"What does the method {member} of {name} do?", method.__doc__
    elif inspect.isroutine(value):
        yield f"What does {name} do?", value.__doc__


def _public(owner: Any) -> list[tuple[str, Any]]:
    return [(n, v) for n, v in sorted(vars(owner).items()) if not n.startswith("_")]


def _first_paragraph(text: str | None) -> str | None:
    """Return the first paragraph that is no signature, in one line, if its length is right."""
    if not isinstance(text, str):
        return None
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        line = " ".join(paragraph.split())
        if not _SIGNATURE.search(line) and not _ADDRESS.search(line):
            return line if _LENGTHS[0] <= len(line) <= _LENGTHS[1] else None
    return None
