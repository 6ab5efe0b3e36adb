# SPDX-License-Identifier: Apache-2.0
"""Whole runs on one rank: durations, exits, evaluation, saving, and what can be passed in."""

from __future__ import annotations

import copy
import math
import os
import signal

import attrs
import pytest
import torch
from mb_config.records import EvalEvent, LossTerms, RunEnd, RunInfo, SaveEvent, StepEvent
from mb_engine import Components, Engine, EngineError, NumericsError, finetune, pretrain
from mb_engine.data.datasets import Datasets
from mb_engine.testing import run_ranks, tiny_config

pytestmark = pytest.mark.dist
TINY = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "logger.log_interval=1",
    "model.seq_length=16",
    "tokenizer.tokenizer_type='null'",
    "tokenizer.vocab_size=128",
]


class Record:
    def __init__(self, act=None):
        self.events, self.act = [], act

    def on_event(self, event):
        self.events.append(event)
        if self.act:
            self.act(event)

    def of(self, kind):
        return [e for e in self.events if isinstance(e, kind)]


class Done:
    def wait_staged(self):
        pass

    def done(self):
        return True

    def result(self, timeout=None):
        pass


def place(shard):
    """Name one piece: a tensor may come in several."""
    return shard.key, shard.offset, shard.flat_range


class InMemory:
    """A checkpointer for one rank that keeps copies."""

    def __init__(self, fail_at=()):
        self.kept, self.fail_at = {}, fail_at

    def save(self, step, state):
        if step in self.fail_at:
            raise OSError("no space left on device")
        tensors = {
            place(s): s.data.clone() for g in state.values() if isinstance(g, list) for s in g
        }
        plain = {k: copy.deepcopy(v) for k, v in state.items() if not isinstance(v, list)}
        self.kept[step] = (tensors, plain)
        return Done()

    def load(self, state, step=None):
        tensors, plain = self.kept[max(self.kept) if step is None else step]
        for group in state.values():
            for shard in group:
                shard.data.copy_(tensors[place(shard)])
        return plain

    def steps(self):
        return sorted(self.kept)


def run(*overrides, act=None, **parts):
    record = Record(act)
    result = pretrain(tiny_config(*TINY, *overrides), callbacks=[record], **parts)
    return result, record


def losses(record):
    return [e.loss for e in record.of(StepEvent)]


def durations():
    seen = {}
    for text in ("train_iters=3", "train_samples=24", "train_tokens=384"):
        unset = [] if text.startswith("train_iters") else ["train.train_iters=null"]
        result, record = run(*unset, f"train.{text}")
        seen[text] = (result.reason, result.state.step, len(record.of(StepEvent)))
    result, _ = run("train.train_iters=null", "train.num_epochs=1.5", "dataset.num_samples=16")
    seen["epochs"] = result.state.step
    result, _ = run("train.train_iters=9", "train.exit_interval=4")
    seen["interval"] = (result.reason, result.state.step)
    result, _ = run("train.train_iters=9", "train.exit_duration_in_mins=1e-9")
    seen["minutes"] = (result.reason, result.state.step)

    def interrupt(event):
        if isinstance(event, StepEvent) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    store = InMemory()
    result, record = run(
        "train.train_iters=9",
        "checkpoint.save=memory",
        act=interrupt,
        components=Components(checkpointer=store),
    )
    seen["signal"] = (result.reason, result.state.step, store.steps(), result.exit_code)
    seen["handler"] = signal.getsignal(signal.SIGTERM) == before
    return seen


def test_a_run_ends_when_its_duration_or_an_exit_condition_says():
    seen = run_ranks(durations, 1)[0]
    assert seen["train_iters=3"] == ("train_iters=3 reached", 3, 3)
    assert seen["train_samples=24"] == ("train_samples=24 reached", 3, 3)
    assert seen["train_tokens=384"][1] == 3
    assert seen["epochs"] == 3
    assert seen["interval"] == ("exit_interval=4 reached", 4)
    assert seen["minutes"] == ("exit_duration_in_mins=1e-09 reached", 1)
    assert seen["signal"] == ("SIGTERM received", 3, [3], 0)
    assert seen["handler"], "the signal goes back to whoever had it"


def ramp_and_skip():
    _, ramp = run("train.rampup_batch_size=[2,2,12]", "train.train_iters=7")
    _, skip = run("train.iterations_to_skip=[2,3]", "train.train_iters=4")
    _, plain = run("train.train_iters=4")
    return (
        [(e.global_batch_size, e.consumed_samples) for e in ramp.of(StepEvent)],
        [(e.step, e.consumed_samples) for e in skip.of(StepEvent)],
        losses(skip)[0] == losses(plain)[0],
        [type(e).__name__ for e in plain.events],
        plain.of(RunInfo)[0].num_parameters,
    )


def test_batches_ramp_up_and_named_steps_are_passed_over():
    ramp, skip, same, order, parameters = run_ranks(ramp_and_skip, 1)[0]
    consumed, expected = 0, []
    for _ in range(7):
        size = 8 if consumed >= 12 else 2 + 2 * (consumed * 3 // 12)
        consumed += size
        expected.append(consumed)
    assert [c for _, c in ramp] == expected
    assert ramp[0][0] < ramp[-1][0] == 8
    assert skip == [(1, 8), (4, 32)]
    assert same
    assert order == ["RunInfo", *["StepEvent"] * 4, "EvalEvent", "RunEnd"]
    assert parameters == 2 * 128 * 32 + 32 + 2 * 32 + 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 128


class Tokens:
    """Random tokens, the same for the same index."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 128, (size, 17), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.ones(16),
            "position_ids": torch.arange(16),
        }


class Textbook:
    """Next-token cross-entropy from logits in float64, by the formula."""

    def __call__(self, output, batch):
        logits = output.double()
        logits = logits - logits.amax(-1, keepdim=True)
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        nll = -log_p.gather(-1, batch["labels"][..., None]).squeeze(-1)
        mask = batch["loss_mask"]
        right = (output.argmax(-1) == batch["labels"]).float() * mask
        return LossTerms(
            loss_sum=(nll * mask).sum(),
            num_tokens=mask.sum(),
            metrics={"accuracy": (right.sum(), mask.sum())},
        )


def custom_parts():
    data = Datasets(train=Tokens(64, 1), valid={"a": Tokens(11, 2), "b": Tokens(16, 3)})
    calls = []

    def forward_step(model, batch):
        calls.append(tuple(batch["tokens"].shape))
        return model(batch["tokens"], batch["position_ids"], None)

    overrides = ["train.train_iters=3", "validation.eval_interval=2", "validation.eval_iters=5"]
    built_in, a = run(*overrides, datasets=data)
    custom, b = run(*overrides, datasets=data, objective=Textbook(), forward_step=forward_step)
    _, c = run(*overrides, "train.micro_batch_size=8", datasets=data)
    full, _ = run("validation.full_validation=true", "train.train_iters=1", datasets=data)
    return {
        "losses": [losses(r) for r in (a, b, c)],
        "norms": [[e.grad_norm for e in r.of(StepEvent)] for r in (a, b, c)],
        "accuracy": [e.metrics for e in b.of(StepEvent)],
        "calls": set(calls),
        "evaluations": [
            (e.step, e.name, e.loss, e.perplexity, e.num_tokens) for e in a.of(EvalEvent)
        ],
        "custom": {n: e.loss for n, e in custom.evaluations.items()},
        "built_in": {n: e.loss for n, e in built_in.evaluations.items()},
        "full": {n: e.num_tokens for n, e in full.evaluations.items()},
    }


@pytest.fixture(scope="module")
def seen():
    return run_ranks(custom_parts, 1)[0]


def test_a_loss_a_forward_step_and_data_can_be_passed_in(seen):
    built_in, textbook, one_micro_batch = seen["losses"]
    assert built_in == pytest.approx(textbook, abs=1e-6)
    assert built_in == pytest.approx(one_micro_batch, abs=1e-6)
    assert seen["norms"][0] == pytest.approx(seen["norms"][1], rel=1e-4)
    assert seen["norms"][0] == pytest.approx(seen["norms"][2], rel=1e-4)
    assert all(0 <= m["accuracy"] <= 1 for m in seen["accuracy"])
    assert seen["calls"] == {(2, 16)}
    assert seen["built_in"] == pytest.approx(seen["custom"], abs=1e-6)


def test_every_validation_set_is_evaluated_and_no_sample_twice(seen):
    during = [row for row in seen["evaluations"] if row[0] == 2]
    assert [name for _, name, *_ in during] == ["a", "b"]
    assert [tokens for *_, tokens in during] == [11 * 16, 16 * 16]
    assert all(ppl == pytest.approx(math.exp(loss)) for _, _, loss, ppl, _ in during)
    assert seen["full"] == {"a": 11 * 16, "b": 16 * 16}


def resume():
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    save = ["checkpoint.save=memory", "checkpoint.save_interval=4", *dropout]
    length = ["train.train_iters=8", "scheduler.lr_decay_iters=8"]
    whole_store, store = InMemory(), InMemory()
    _, whole = run(*save, *length, components=Components(checkpointer=whole_store))
    run(*save, *length, "train.exit_interval=4", components=Components(checkpointer=store))
    resumed, rest = run(
        *save, *length, "checkpoint.load=memory", components=Components(checkpointer=store)
    )
    a, b = whole_store.kept[8][0], store.kept[8][0]
    _, tuned = run(
        "checkpoint.pretrained_checkpoint=memory",
        "train.train_iters=1",
        *dropout,
        components=Components(initial=whole_store),
    )
    with pytest.raises(EngineError, match=r"model.num_layers=2 but the checkpoint has 1"):
        run(
            "checkpoint.load=memory",
            "model.num_layers=2",
            *length,
            components=Components(checkpointer=store),
        )
    return {
        "whole": losses(whole),
        "rest": losses(rest),
        "start": rest.of(RunInfo)[0].start_step,
        "same": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
        "keys": sorted({key for key, *_ in a}),
        "consumed": resumed.state.consumed_samples,
        "tuned": (tuned.of(RunInfo)[0].start_step, losses(tuned)[0]),
    }


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit():
    seen = run_ranks(resume, 1)[0]
    assert seen["start"] == 4
    assert seen["rest"] == seen["whole"][4:]
    assert seen["same"]
    assert any(k.startswith("rng.rank_00000.") for k in seen["keys"])
    assert any(k.startswith("optimizer.exp_avg_sq.") for k in seen["keys"])
    assert seen["consumed"] == 64
    assert seen["tuned"][0] == 0
    assert seen["tuned"][1] < seen["whole"][0]


def failures():
    store = InMemory(fail_at=(2, 4))
    result, record = run(
        "train.train_iters=6",
        "checkpoint.save=memory",
        "checkpoint.save_interval=2",
        components=Components(checkpointer=store),
    )
    saves = [(e.step, e.status, e.error) for e in record.of(SaveEvent) if e.status != "started"]
    poisoned = Tokens(32, 1)
    bad = {}

    class Infinite:
        def __call__(self, output, batch):
            terms = Textbook()(output, batch)
            return attrs.evolve(terms, loss_sum=terms.loss_sum * float("inf"))

    record = Record()
    try:
        config = tiny_config(*TINY, "train.train_iters=3")
        pretrain(
            config, datasets=Datasets(train=poisoned), objective=Infinite(), callbacks=[record]
        )
    except NumericsError as error:
        bad["numerics"] = str(error)
    bad["end"] = [(e.exit_code, e.reason) for e in record.of(RunEnd)]
    return result.failed_saves, result.state.step, saves, store.steps(), bad


def test_failed_saves_are_reported_and_survived_and_bad_numbers_are_not():
    failed, step, saves, steps, bad = run_ranks(failures, 1)[0]
    assert (failed, step) == (2, 6)
    full = "no space left on device"
    assert saves == [(2, "failed", full), (4, "failed", full), (6, "saved", "")]
    assert steps == [6]
    assert "at step 1" in bad["numerics"]
    assert "iterations_to_skip" in bad["numerics"]
    assert bad["end"][0][0] == 1


def test_finetuning_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint.pretrained_checkpoint"):
        finetune(tiny_config())


def own_loop():
    config = tiny_config(*TINY, "optimizer.lr=3e-2", "scheduler.lr_decay_style=constant")
    engine = Engine.from_config(config)
    with pytest.raises(EngineError, match="forward_backward before"):
        engine.optimizer_step()
    data = Tokens(2, 5)
    batch = {k: torch.stack([data[0][k], data[1][k]]) for k in data[0]}
    seen = []
    for _ in range(60):
        seen.append(float(engine.forward_backward([batch]).loss))
        engine.optimizer_step()
    evaluated = float(engine.evaluate([[batch]]).loss)
    prompt = data.ids[0, :8].tolist()
    greedy = engine.generate(prompt, 8, temperature=0)
    again = [engine.generate(prompt, 8, seed=3) for _ in range(2)]
    stopped = engine.generate(prompt, 8, temperature=0, stop=greedy[9])
    with pytest.raises(EngineError, match="one token shape"):
        engine.forward_backward([batch, {k: v[:1] for k, v in batch.items()}])
    with pytest.raises(EngineError, match="at least one token"):
        engine.generate([], 1)
    engine.close()
    return seen, evaluated, greedy, data.ids[0, :16].tolist(), again, stopped


def test_an_own_loop_can_train_evaluate_and_generate():
    seen, evaluated, greedy, memorised, again, stopped = run_ranks(own_loop, 1)[0]
    assert seen[-1] < 0.2 < seen[0]
    assert evaluated == pytest.approx(seen[-1], abs=0.1)
    assert greedy == memorised, "a memorised sequence is continued"
    assert again[0] == again[1]
    assert len(stopped) <= 10
