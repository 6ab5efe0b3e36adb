# SPDX-License-Identifier: Apache-2.0
"""A process that writes staged bytes out of shared memory, so that the training process does not.

Started as ``python -c START`` with a line of JSON a task on its standard input, and a line of JSON an
answer on its standard output. It ends when its input does, which is when its parent ends.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mb_ckpt.errors import CheckpointError
from mb_ckpt.places.stores import open_store
from mb_ckpt.saving.writing import perform

if TYPE_CHECKING:
    from mb_ckpt.saving.writing import Task

# Only the modules it needs: not the package's own __init__, which imports torch.
_START = """
import json, sys, types
place, sys.path[:] = sys.argv[1], json.loads(sys.argv[2])
package = types.ModuleType("mb_ckpt")
package.__path__ = [place]
sys.modules["mb_ckpt"] = package
from mb_ckpt.saving.writer_process import serve
serve(int(sys.argv[3]), int(sys.argv[4]))
"""
_END_S = 10.0
_NICE = 10
"""Training goes first where there is no processor to spare."""


class WriterProcess:
    """The parent's side: one child, started at the first task and again if it has died.

    Args:
        url: The place that tasks write to.
        descriptor: Of the shared memory that holds the bytes.
    """

    def __init__(self, url: str, descriptor: int) -> None:
        self._url = url
        self._descriptor = descriptor
        self._child: subprocess.Popen[str] | None = None
        self._reaper: Any = None

    @property
    def pid(self) -> int | None:
        """Of the child, None if there is none."""
        return None if self._child is None else self._child.pid

    def perform(self, task: Task) -> dict[str, Any] | None:
        """Have the child do *task*; see `mb_ckpt.saving.writing.perform`.

        Raises:
            OSError: If the storage refuses, or the child dies.
            ValueError: As tensorstore says it.
        """
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps({"url": self._url, "task": task}) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            raise OSError(f"the writer process ended with code {child.returncode} while writing")
        answer = json.loads(line)
        if "error" in answer:
            code, text = answer["error"]
            raise ValueError(text) if code is None else OSError(code, text)
        file: dict[str, Any] | None = answer["file"]
        return file

    def close(self) -> None:
        """End the child and take its exit status."""
        if self._reaper is not None:
            self._reaper()
            self._reaper = self._child = None

    def _started(self) -> subprocess.Popen[str]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        arguments = [
            str(Path(__file__).parents[1]), json.dumps(sys.path), str(self._descriptor), str(os.getpid())
        ]  # fmt: skip
        self._child = subprocess.Popen(  # noqa: S603  # this interpreter, our own module
            [sys.executable, "-c", _START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=(self._descriptor,),
        )
        # Runs at close, when this object goes, and when the interpreter ends.
        self._reaper = weakref.finalize(self, _reap, self._child)
        return self._child


def _reap(child: subprocess.Popen[str]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def serve(descriptor: int, parent: int) -> None:
    """The child's side: do tasks until the input ends or the *parent* is gone."""
    os.nice(_NICE)
    tasks: queue.Queue[str] = queue.Queue()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write among the answers
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    while True:
        asked = json.loads(tasks.get())
        answers.write(json.dumps(_answer(asked["url"], asked["task"], descriptor)) + "\n")
        answers.flush()


def _listen(tasks: queue.Queue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


def _watch(parent: int) -> None:
    """End with the parent even where others, forked by it, hold our input open."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _answer(url: str, task: Task, descriptor: int) -> dict[str, Any]:
    nbytes = task["nbytes"]
    try:
        # Not closed here: the map goes when the last array that refers to it does.
        memory = mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ) if nbytes else b""
        return {"file": perform(open_store(url), task, np.frombuffer(memory, np.uint8))}
    except (OSError, ValueError, CheckpointError) as e:
        return {"error": (getattr(e, "errno", None), getattr(e, "strerror", None) or str(e))}
