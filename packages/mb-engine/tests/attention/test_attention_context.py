# SPDX-License-Identifier: Apache-2.0
"""Context parallelism by ring, all-gather and all-to-all against full attention in float64.

Tolerance: 1e-12 absolute, some thousand float64 roundings (1e-16) of numbers near 1. The reference
is written out over whole sequences with a mask of who sees whom, and shares no code with what it
checks.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine.testing import run_ranks, tiny_config

pytestmark = pytest.mark.dist

HEADS, WIDTH = 8, 16
WHOLE = [32]
PACKED = [16, 8, 24]
"""Multiples of 8, which is 2 x CP4."""

CASES = {
    "grouped": {"groups": 4},
    "a group a head": {"groups": 8, "batch": 1},
    "packed": {"groups": 4, "lengths": PACKED},
    "capped": {"groups": 4, "cap": 1.5},
    "capped, packed": {"groups": 4, "cap": 1.5, "lengths": PACKED},
    "narrow values": {"groups": 4, "value_width": 8},
    "unfused": {"groups": 4, "backend": "unfused"},
    "window": {"groups": 4, "window": (5, 0)},
    "window, packed": {"groups": 4, "window": (5, 0), "lengths": PACKED},
}
EXCHANGES = ("p2p", "all_gather", "a2a")
RUNS = [(exchange, name) for exchange in EXCHANGES for name in CASES if "window" not in name] + [
    (exchange, name) for exchange in EXCHANGES[1:] for name in CASES if "window" in name
]


def whole_tensors(case):
    """Return queries, keys, values and the output's gradient, whole, ``[T, B, heads, width]``."""
    lengths = case.get("lengths", WHOLE)
    batch = 1 if "lengths" in case else case.get("batch", 2)
    width = case.get("value_width", WIDTH)
    generator = torch.Generator().manual_seed(3)

    def make(heads, width):
        shape = (sum(lengths), batch, heads, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        make(HEADS, WIDTH),
        make(case["groups"], WIDTH),
        make(case["groups"], width),
        make(HEADS, width),
    )


def expected(case):
    """Return output and gradients of full attention."""
    lengths = case.get("lengths", WHOLE)
    *inputs, upstream = whole_tensors(case)
    q, k, v = (x.requires_grad_() for x in inputs)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    distance = place[:, None] - place[None, :]
    visible = (sample[:, None] == sample[None, :]) & (distance >= 0)
    if "window" in case:
        visible &= distance <= case["window"][0]
    repeats = HEADS // case["groups"]
    scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(repeats, 2)) / WIDTH**0.5
    if "cap" in case:
        scores = case["cap"] * torch.tanh(scores / case["cap"])
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = torch.einsum("bhst,tbhd->sbhd", weights, v.repeat_interleave(repeats, 2))
    out.backward(upstream)
    return [x.detach() for x in (out, q.grad, k.grad, v.grad)]


def rows_of(rank, ranks, lengths):
    """Return which rows are a rank's: chunks r and 2 * cp - 1 - r of each sample."""
    rows, start = [], 0
    for length in lengths:
        chunk = length // (2 * ranks)
        for index in (rank, 2 * ranks - 1 - rank):
            rows += range(start + index * chunk, start + (index + 1) * chunk)
        start += length
    return rows


def core_attention(case, exchange, *, layer_number=1):
    from mb_engine.model.attention import TorchAttention
    from mb_engine.model.gpt import transformer_config
    from mb_engine.runtime.distributed import world_size_from_environment
    from megatron.core.transformer.enums import AttnMaskType

    world = world_size_from_environment()
    overrides = [f"model.context_parallel_size={world}", f"model.cp_comm_type={exchange}"]
    overrides += ["model.num_attention_heads=8", f"model.num_query_groups={case['groups']}"]
    overrides += ["model.kv_channels=16", f"model.seq_length={sum(case.get('lengths', WHOLE))}"]
    if "cap" in case:
        overrides.append(f"model.attn_logit_softcapping={case['cap']}")
    if "window" in case:
        overrides.append(f"model.window_size={list(case['window'])}")
    if "backend" in case:
        overrides.append(f"model.attention_backend={case['backend']}")
    overrides += case.get("overrides", [])
    config = transformer_config(tiny_config(*overrides).finalize(world))
    return TorchAttention(config, layer_number, AttnMaskType.causal, "self", cp_comm_type=exchange)


def run_all(runs, dtype=torch.float64):
    """Return this rank's output and gradients of each run."""
    from mb_engine.runtime.distributed import initialize, shutdown, world_size_from_environment
    from mb_engine.runtime.seeding import seed_everything

    world = world_size_from_environment()
    config = tiny_config(f"model.context_parallel_size={world}").finalize(world)
    layout = initialize(config)
    seed_everything(config.rng, layout)
    found = [run_one(layout, exchange, CASES[name], dtype) for exchange, name in runs]
    shutdown()
    return found


def run_one(layout, exchange, case, dtype):
    from mb_engine.model.attention import PackedSequences
    from mb_engine.parallel.sequence import Packing

    lengths = case.get("lengths", WHOLE)
    rows = rows_of(layout.cp_rank, layout.cp, lengths)
    *inputs, upstream = (x[rows].to(dtype) for x in whole_tensors(case))
    q, k, v = (x.requires_grad_() for x in inputs)
    packed = None
    if "lengths" in case:
        packed = PackedSequences.of(
            Packing(lengths=tuple(lengths), max_length=max(lengths)),
            device=torch.device("cpu"),
            cp=layout.cp,
            cp_rank=layout.cp_rank,
        )
    core = core_attention(case, exchange)
    out = core(q, k, v, packed_seq_params=packed)
    out.backward(upstream.flatten(2))
    return out.detach().view(upstream.shape), q.grad, k.grad, v.grad


@pytest.fixture(scope="module")
def results():
    # All-to-all needs a head of keys for each rank, which 4 groups have.
    return {ranks: run_ranks(run_all, ranks, RUNS, timeout_s=240) for ranks in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("exchange", "name"), RUNS)
def test_ranks_compute_full_attention_and_its_gradients(results, ranks, exchange, name):
    case = CASES[name]
    by_rank = [found[RUNS.index((exchange, name))] for found in results[ranks]]
    for what, reference, parts in zip(
        ("output", "queries", "keys", "values"),
        expected(case),
        zip(*by_rank, strict=True),
        strict=True,
    ):
        whole = torch.full_like(reference, float("nan"))
        for rank, part in enumerate(parts):
            whole[rows_of(rank, ranks, case.get("lengths", WHOLE))] = part
        assert reference.abs().max() > 0.1
        torch.testing.assert_close(
            whole, reference, rtol=0, atol=1e-12, msg=lambda m, w=what: f"{w}: {m}"
        )


def test_16_bit_rings_round_no_more_than_16_bits_do():
    """Partial results are merged in float32, so that the error does not grow with the ranks."""
    runs = [("p2p", "grouped"), ("p2p", "packed")]
    by_rank = run_ranks(run_all, 4, runs, torch.bfloat16)
    for index, (_, name) in enumerate(runs):
        case = CASES[name]
        references = expected(case)
        for rank, found in enumerate(by_rank):
            rows = rows_of(rank, 4, case.get("lengths", WHOLE))
            for part, reference in zip(found[index], references, strict=True):
                assert part.dtype == torch.bfloat16
                # 2**-8 is one rounding; inputs, probabilities and outputs are each rounded once.
                bound = 4 * 2**-8 * reference.abs().max()
                assert (part.double() - reference[rows]).abs().max() < bound


def drop_and_recompute():
    """Return what dropout draws and leaves here, and losses with attention recomputed or not."""
    from mb_engine import Engine
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    dropping = {"groups": 8, "overrides": ["model.attention_dropout=0.5"]}
    config = tiny_config("model.context_parallel_size=2").finalize(2)
    layout = initialize(config)
    seed_everything(config.rng, layout)
    q = torch.zeros(16, 1, HEADS, WIDTH)
    by_heads = core_attention(dropping, "a2a")(q, q, torch.ones_like(q))
    with core_attention(dropping, "all_gather")._random_state():
        dropped = torch.rand(16), by_heads
    shutdown()
    losses = []
    for settings in (
        ["model.cp_comm_type=p2p"],
        ["model.cp_comm_type=all_gather", "model.attention_dropout=0.2"],
        ["model.cp_comm_type=a2a", "model.attention_dropout=0.2", "model.hidden_dropout=0.1"],
    ):
        for recompute in ([], ["recompute.recompute_granularity=selective"]):
            engine = Engine.from_config(
                tiny_config(
                    "model.context_parallel_size=2",
                    "model.num_layers=2",
                    "train.global_batch_size=2",
                    *settings,
                    *recompute,
                )
            )
            ids = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(5))
            batch = {
                "tokens": ids[:, :-1],
                "labels": ids[:, 1:].contiguous(),
                "loss_mask": torch.ones(2, 32),
                "position_ids": torch.arange(32).expand(2, -1),
            }
            losses.append([])
            for _ in range(3):
                losses[-1].append(float(engine.forward_backward([batch]).loss))
                losses[-1].append(engine.optimizer_step().grad_norm)
            engine.close()
    return dropped, losses


@pytest.fixture(scope="module")
def dropped_and_recomputed():
    return run_ranks(drop_and_recompute, 2, timeout_s=240)


def test_ranks_that_attend_for_other_tokens_or_heads_drop_others(dropped_and_recomputed):
    """Where all weights and values are equal, an output is the part kept, twice.

    With all-to-all the first half of the heads was computed on rank 0, the second on rank 1.
    """
    (drawn, by_heads), (drawn_there, _) = (dropped for dropped, _ in dropped_and_recomputed)
    assert not torch.equal(drawn, drawn_there)
    first, second = by_heads.chunk(2, dim=-1)
    assert not torch.equal(first, second)
    assert by_heads[3:].mean().item() == pytest.approx(1.0, abs=0.15)
    assert by_heads.std() > 0.05


def test_recomputed_attention_has_the_same_gradients_and_drops_the_same(dropped_and_recomputed):
    for _, losses in dropped_and_recomputed:
        for kept, recomputed in zip(losses[::2], losses[1::2], strict=True):
            assert kept == recomputed
        assert losses[0][0] != losses[2][0], "dropout must have been on"
