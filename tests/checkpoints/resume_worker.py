# SPDX-License-Identifier: Apache-2.0
"""One rank of a run that reports when it may be killed; started by torchrun from test_resume.py."""

import os
import sys
import time
from pathlib import Path

from mb_config import ConfigContainer
from mb_config.records import SaveEvent, StepEvent
from mb_engine import pretrain


class StopAt:
    """Once a checkpoint is durable and *step* is done, says so and waits to be killed."""

    def __init__(self, step, sign):
        self.step, self.sign, self.saved = step, sign, False

    def on_event(self, event):
        if isinstance(event, SaveEvent) and event.status == "saved":
            self.saved = True
        if isinstance(event, StepEvent) and event.step >= self.step and self.saved:
            self.sign.touch()
            time.sleep(600)


def main():
    folder, stop_at, *overrides = sys.argv[1:]
    folder = Path(folder)
    (folder / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    config = ConfigContainer.from_yaml(folder / "config.yaml").override(*overrides)
    callbacks = [StopAt(int(stop_at), folder / "kill_me")] if int(stop_at) else []
    pretrain(config, callbacks=callbacks)


if __name__ == "__main__":
    main()
