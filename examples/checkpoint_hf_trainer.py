# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with mb-ckpt in place of its own checkpoints, by way of a callback.

    python examples/checkpoint_hf_trainer.py --steps 20
    python examples/checkpoint_hf_trainer.py --steps 40     # goes on at step 20

Trainer stops for as long as its own saves take; with the callback, for none of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mb_ckpt import CheckpointStore
from torch.utils.data import IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH, LENGTH, VOCABULARY = 8, 32, 64


class Checkpoints(TrainerCallback):
    """Resumes from the newest step of *store* and saves into it every *interval* steps.

    Args:
        store: Made with ``staging="lazy"``: Trainer has a place for the fence.
        interval: Optimizer steps between saves.
    """

    def __init__(self, store: CheckpointStore, interval: int) -> None:
        self._store = store
        self._interval = interval
        self._saving: Any = None
        self._random_state: torch.Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Fill model, optimizer and schedule in place."""
        del args, control
        if self._store.steps():
            self._random_state = torch.get_rng_state()
            progress = self._store.load({**_training(parts), "rng": self._random_state})
            state.global_step = progress["step"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Take over the random state, which the data loader has drawn a seed from by now."""
        del args, state, control, parts
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Wait until what is about to change has been copied."""
        del args, state, control, parts
        if self._saving is not None:
            self._saving.wait_staged()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Begin to save where it is due."""
        del args, control
        step = state.global_step
        if step % self._interval == 0 or step == state.max_steps:
            random_state = torch.get_rng_state()
            training = {**_training(parts), "rng": random_state, "step": step}
            self._saving = self._store.save(step, training)


def _training(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: parts[name] for name in ("model", "optimizer", "lr_scheduler")}


class Text(IterableDataset):  # type: ignore[type-arg]
    """Made-up text, from sample *start* on: the data position of a run."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        index = self.start
        while True:
            generator = torch.Generator().manual_seed(index)
            ids = torch.randint(0, VOCABULARY, (LENGTH // 2,), generator=generator).repeat(2)
            yield {"input_ids": ids, "labels": ids}
            index += 1


def main() -> None:
    """Train up to ``--steps``, from the newest checkpoint where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape))
    with CheckpointStore(arguments.folder / "steps", staging="lazy", keep_last=2) as store:
        done = store.inspect().plain["step"] if store.steps() else 0
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(arguments.folder),
                max_steps=arguments.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=3e-3,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                logging_steps=1,
                save_strategy="no",  # the callback saves
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=Text(done * BATCH),
            callbacks=[Checkpoints(store, arguments.save_every)],
        )
        trainer.train()
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"after step {trainer.state.global_step} the parameters add up to {total!r}")


if __name__ == "__main__":
    main()
