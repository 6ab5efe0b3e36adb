# SPDX-License-Identifier: Apache-2.0
"""The second main job: a Hugging Face folder and a JSONL file in, a fine-tuned folder out.

Makes a small Llama with random weights and chats about Python's standard library, takes the model
over, trains it on packed chats with two ranks, evaluates it on chats it has not seen, exports it and
holds it against ``transformers`` before and after. The training and the export are the command line
that a user would type.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import finetune_data
import torch

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 2e-4
"""Of the largest logit: float32 sums in another order."""
LEARNT = 0.85
"""Held-out loss after training, of that before."""
VOCABULARY, LENGTH = 2048, 1024  # a vocabulary that needs no padding: one loss everywhere
EPOCHS = 4
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTION = "What does shutil.copyfile do?"
TRAINING = """
model.seq_length=1024 dataset.type=sft dataset.packing=offline
train.micro_batch_size=1 train.global_batch_size=2
optimizer.lr=3.0e-3 optimizer.min_lr=3.0e-4 optimizer.adam_beta2=0.95 optimizer.weight_decay=0.1
optimizer.use_distributed_optimizer=true scheduler.lr_decay_style=cosine scheduler.lr_warmup_iters=5
validation.full_validation=true checkpoint.save_optim=false
logger.run_name=finetune logger.sinks=[console,jsonl,tensorboard,plot]
"""


def main() -> None:
    """Run it all and say where everything is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"), help="what is made")
    parser.add_argument("--pairs", type=int, help="questions to use; default: all, some 4000")
    parser.add_argument("--steps", type=int, help=f"training steps; default: {EPOCHS} epochs")
    arguments = parser.parse_args()
    # These libraries' own remarks are about how they are written, not about what the user does.
    warnings.filterwarnings("ignore", module=r"(megatron|transformers|torch)\b")
    logging.basicConfig(level=logging.WARNING)
    begun = time.perf_counter()
    run = Demo(arguments.folder)
    run.make(arguments.pairs)
    run.take_over()
    run.train(arguments.steps)
    run.export()
    run.summary(time.perf_counter() - begun)


class Demo:
    """The parts of the job, in order; all that is made lies below one folder."""

    def __init__(self, folder: Path) -> None:
        """Begin with *folder* empty."""
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.source, self.exported = folder, folder / "source", folder / "exported"
        self.checkpoints, self.config = folder / "checkpoints", folder / "run.yaml"
        self.chats: dict[str, Path] = {}
        self.differences: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def make(self, pairs: int | None) -> None:
        """Write the chats and a model with random weights."""
        print("=== Make chats and a model", flush=True)
        self.chats = finetune_data.write_chats(self.folder / "data", most=pairs)
        counts = {name: len(_lines(file)) for name, file in self.chats.items()}
        print(f"{counts['train']} chats to train on, {counts['heldout']} held out", flush=True)
        make_model(
            self.source, [m["content"] for file in self.chats.values() for m in _turns(file)]
        )
        print(f"a Llama with random weights: {self.source}", flush=True)

    def take_over(self) -> None:
        """Compare the imported model with the original, and evaluate it."""
        print("\n=== Compare the imported model with transformers", flush=True)
        self.compare("imported", self.source, self.source)
        self.losses["before"] = held_out_loss(self.source, self.chats["heldout"])
        print(f"held-out loss {self.losses['before']:.3f} before training", flush=True)

    def train(self, steps: int | None) -> None:
        """Train on two ranks, or on the GPUs there are, and evaluate."""
        from mb_engine.bridge import config_from_hf

        config = config_from_hf(self.source).override(
            *TRAINING.split(),
            f"dataset.path=['{self.chats['train']}']",
            f"dataset.validation_paths.heldout={self.chats['heldout']}",
            f"train.train_iters={steps}" if steps else f"train.num_epochs={EPOCHS}",
            f"checkpoint.save={self.checkpoints}",
            f"logger.log_dir={self.folder}",
        )
        config.to_yaml(self.config)
        ranks = min(2, torch.cuda.device_count()) or 2
        print(f"\n=== Train on packed chats, {ranks} ranks", flush=True)
        mb_train("run", f"--config={self.config}", f"--nproc={ranks}")
        events = [json.loads(line) for line in _lines(self.folder / "metrics.jsonl")]
        evaluation = [event for event in events if event["kind"] == "eval"][-1]
        self.losses["after"] = evaluation["loss"]

    def export(self) -> None:
        """Write a Hugging Face folder, compare it with the checkpoint and let it answer."""
        print("\n=== Export", flush=True)
        mb_train("convert", "export", str(self.checkpoints), str(self.exported))
        print("\n=== Compare the exported model with ours", flush=True)
        self.compare("exported", self.checkpoints, self.exported)
        self.losses["in transformers"] = held_out_loss(self.exported, self.chats["heldout"])
        print(f"\nuser       {QUESTION}")
        print(f"assistant  {answer(self.exported, QUESTION)}", flush=True)

    def compare(self, name: str, ours: Path, theirs: Path) -> None:
        """Record how far our logits are from those of ``transformers``, of the largest."""
        model, tokenizer = load(theirs)
        texts = [render(tokenizer, chat) for chat in _chats(self.chats["heldout"])[:4]]
        worst = 0.0
        rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        with torch.no_grad():
            expected = [model(row).logits for row in rows]
        for mine, their in zip(our_logits(ours, self.source, rows), expected, strict=True):
            worst = max(worst, float((mine - their).abs().max() / their.abs().max()))
        self.differences[name] = worst
        print(f"largest difference of a logit: {worst:.1e} of the largest", flush=True)

    def summary(self, seconds: float) -> None:
        """Print what came out and what to try next; exit 1 if something is not as it should be."""
        before, after = self.losses["before"], self.losses["after"]
        again = self.losses["in transformers"]
        print(f"\n=== Done in {seconds:.0f} s")
        print(f"held-out loss    {before:.3f} before, {after:.3f} after", end="")
        print(f" ({math.log(VOCABULARY):.2f} is chance); {again:.3f} in transformers")
        for name, difference in self.differences.items():
            print(f"{name} logits  within {difference:.1e} of the largest of transformers'")
        print(f"fine-tuned       {self.exported}  (transformers loads it)")
        print(f"checkpoints      {self.checkpoints}")
        print(f"metrics          {self.folder / 'metrics.jsonl'}, {self.folder / 'loss.png'}")
        print(f"data             {self.folder / 'data'}")
        print(f"next             mb-train run --config {self.config} \\")
        print("                   model.tensor_model_parallel_size=2")
        print("                 mb-train run --recipe qwen3_0_6b_sft dataset.path=[chats.jsonl] \\")
        print("                   checkpoint.pretrained_checkpoint=./Qwen3-0.6B  # your own model")
        print("                 docs/sft.md, docs/bridge.md")
        if max(self.differences.values()) > TOLERANCE or after > LEARNT * before:
            sys.exit(
                f"error: expected differences below {TOLERANCE}, a loss below {LEARNT * before}"
            )
        if abs(after - again) > TOLERANCE * after:
            sys.exit(f"error: transformers has a held-out loss of {again}, we have {after}")


def make_model(folder: Path, texts: list[str]) -> None:
    """Write a small Llama with random weights, and a tokenizer trained on *texts*."""
    import tokenizers
    import transformers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def mb_train(*arguments: str) -> None:
    """Run ``mb-train`` and stop with its exit code if it fails."""
    print(f"$ mb-train {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "mb_engine.cli", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def our_logits(weights: Path, model: Path, rows: list[Tensor]) -> list[Tensor]:
    """Return the logits of our model, float32, on one rank of the CPU.

    Args:
        weights: A Hugging Face folder or a checkpoint.
        model: The Hugging Face folder that describes the model.
        rows: Token ids ``[1, S]`` each.
    """
    from mb_engine import Engine, compose
    from mb_engine.bridge import config_from_hf, load_hf

    config = config_from_hf(model).override(
        "dist.device=cpu",
        "dataset.type=mock",
        f"model.seq_length={LENGTH}",
        "train.train_iters=1",
        f"checkpoint.pretrained_checkpoint={weights}",
    )
    engine = Engine.from_config(config)
    try:
        _, checkpoint = compose.checkpointers_of(engine.config, engine.layout)
        if checkpoint is None:
            load_hf(engine, weights)
        else:
            engine.load(checkpoint, weights_only=True)
        with engine.eval_mode():
            return [
                engine.model[0](row, torch.arange(row.size(1))[None], None)[..., :VOCABULARY]
                for row in rows
            ]
    finally:
        engine.close()


def load(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of *folder* as ``transformers`` reads them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def held_out_loss(folder: Path, chats: Path) -> float:
    """Return the mean loss over the tokens of all answers, as ``transformers`` computes it."""
    model, tokenizer = load(folder)
    total, tokens = 0.0, 0
    for chat in _chats(chats):
        ids = tokenizer(render(tokenizer, chat), return_tensors="pt")["input_ids"]
        start = tokenizer(render(tokenizer, chat[:1], prompt=True), return_tensors="pt")
        first = start["input_ids"].size(1)
        with torch.no_grad():
            logits = model(ids).logits[0, first - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")
        total, tokens = total + float(loss), tokens + len(logits)
    return total / tokens


def answer(folder: Path, question: str) -> str:
    """Return what the model says to *question*."""
    model, tokenizer = load(folder)
    asked = render(tokenizer, [{"role": "user", "content": question}], prompt=True)
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    text: str = tokenizer.decode(made[0, ids.size(1) :], skip_special_tokens=True)
    return text


def render(tokenizer: Any, chat: list[dict[str, str]], *, prompt: bool = False) -> str:
    """Return *chat* as text."""
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    return text


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _chats(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in _lines(file)]


def _turns(file: Path) -> list[dict[str, str]]:
    return [message for chat in _chats(file) for message in chat]


if __name__ == "__main__":
    main()
