# SPDX-License-Identifier: Apache-2.0
"""orbax in an environment of its own: a process that holds the state as JAX arrays, and its proxy.

Run by that environment's Python with a state's name, this file answers lines of JSON; imported, it
gives the proxy that the other contenders are interleaved with.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("orbax-checkpoint", "jax", "attrs")


def install(folder: Path) -> str | None:
    """Make the environment in *folder*; return its Python, None where it cannot be installed."""
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"orbax is left out, it cannot be installed: {error}")
        return None
    return str(python)


class OrbaxProcess:
    """What the rank sees: seconds as the other process measured them."""

    def __init__(self, python: str, state: str, root: Path) -> None:
        self._root = root
        self._process = subprocess.Popen(
            [python, __file__, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def folder(self, step: int) -> Path:
        return self._root / f"{step:04d}"

    def save(self, step: int) -> dict[str, float]:
        """Return seconds until the loop could go on, and until the save was over."""
        self._root.mkdir(parents=True, exist_ok=True)
        return self._ask({"save": str(self.folder(step).absolute())})

    def load(self, folder: Path) -> float:
        """Return the seconds of a load into new arrays."""
        return self._ask({"load": str(folder.absolute())})["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, question: dict[str, str]) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError("the process of orbax has ended")


def serve(state: str) -> None:
    """Answer until the input ends."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    from contenders.checkpoint_states import kinds

    tree: dict[str, Any] = {
        kind.name: jnp.full((kind.rows, kind.columns), i, jnp.bfloat16 if kind.bf16 else None)
        for i, kind in enumerate(kinds(state))
    }
    jax.block_until_ready(tree)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    for line in sys.stdin:
        asked, began = json.loads(line), time.perf_counter()
        if "save" in asked:
            checkpointer.save(asked["save"], args=ocp.args.StandardSave(tree), force=True)
            blocking = time.perf_counter() - began
            checkpointer.wait_until_finished()
            answer = {"blocking": blocking, "durable": time.perf_counter() - began}
        else:
            restore = ocp.args.StandardRestore(target)
            jax.block_until_ready(checkpointer.restore(asked["load"], args=restore))
            answer = {"seconds": time.perf_counter() - began}
        print(json.dumps(answer), flush=True)
    checkpointer.close()


if __name__ == "__main__":
    serve(sys.argv[1])
