# SPDX-License-Identifier: Apache-2.0
"""Which schedule a configuration of CUDA graphs gets, and what goes around a captured one.

The capture itself needs a GPU and is in ``gpu/``.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine.errors import EngineError
from mb_engine.model.cuda_graphs import LayerGraphs, WholeIteration, with_cuda_graphs
from mb_engine.runtime.megatron_compat import cuda_graph_kind
from mb_engine.testing import run_ranks, tiny_config

WHOLE = [
    "dist.device=auto",
    "rng.te_rng_tracker=true",
    "train.check_for_nan_in_loss=false",
    "cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}",
]
LAYERS = ["dist.device=auto", "rng.te_rng_tracker=true"]


def kinds():
    """Return the kind of graphs that each configuration leads to."""
    from mb_engine.model.gpt import transformer_config
    from mb_engine.runtime.megatron_compat import prepare_megatron
    from mb_engine.runtime.megatron_cpu import install

    install()
    prepare_megatron()
    cases = {
        "none": [],
        "whole": WHOLE,
        "local": [*LAYERS, "cuda_graph.cuda_graph_impl=local"],
        "te": [*LAYERS, "cuda_graph.cuda_graph_impl=transformer_engine"],
    }
    found = {}
    for name, overrides in cases.items():
        made = transformer_config(tiny_config(*overrides).finalize(1))
        found[name] = (cuda_graph_kind(made), made.use_te_rng_tracker)
        if name in {"none", "local"}:

            class Holder(torch.nn.Module):
                config = made

            def schedule(**arguments):
                return arguments

            assert with_cuda_graphs(schedule, [Holder()]) is schedule
    return found


@pytest.mark.dist
def test_each_kind_of_graph_is_told_apart_in_either_version_of_megatron():
    assert run_ranks(kinds, 1)[0] == {
        "none": ("none", False),
        "whole": ("full_iteration", True),
        "local": ("local", True),
        "te": ("transformer_engine", True),
    }


class Replayed:
    """A schedule that writes its losses to the same place at each call, as a graph does."""

    def __init__(self):
        self.place, self.calls = torch.zeros(2), 0

    def __call__(self, *, data_iterator, num_microbatches, **_):
        self.calls += 1
        total = sum(next(data_iterator)["x"].sum() for _ in range(num_microbatches))
        self.place.copy_(torch.stack([total, torch.tensor(1.0)]))
        return [{"loss": (self.place[0], self.place[1])}]


def call(schedule, values, *, forward_only=False):
    batches = [{"x": torch.tensor([float(v)])} for v in values]
    return schedule(
        data_iterator=iter(batches), num_microbatches=len(values), forward_only=forward_only
    )


def test_losses_of_a_whole_iteration_outlive_the_next_replay():
    eager, graphed = Replayed(), Replayed()
    whole = WholeIteration(eager=eager, graphed=graphed)
    first = call(whole, [1, 2])
    second = call(whole, [3, 4])
    assert [float(s[0]["loss"][0]) for s in (first, second)] == [3.0, 7.0]
    assert (eager.calls, graphed.calls) == (0, 2)
    assert float(call(whole, [5], forward_only=True)[0]["loss"][0]) == 5.0
    assert (eager.calls, graphed.calls) == (1, 2)


def test_another_number_of_micro_batches_is_refused():
    whole = WholeIteration(eager=Replayed(), graphed=Replayed())
    call(whole, [1, 2])
    with pytest.raises(EngineError, match="graph of 2 micro-batches cannot run 1"):
        call(whole, [1])


def test_a_batch_of_more_than_tensors_is_refused():
    whole = WholeIteration(eager=Replayed(), graphed=Replayed())
    batch = {"x": torch.ones(1), "packed_seq_params": object()}
    with pytest.raises(EngineError, match="tensors alone, the batch has packed_seq_params"):
        whole(data_iterator=iter([batch]), num_microbatches=1, forward_only=False)


def test_layers_are_captured_once_after_the_warm_up(monkeypatch):
    class Settings:
        cuda_graph_warmup_steps = 2

    captured = []
    monkeypatch.setattr(LayerGraphs, "_capture", lambda self, _: captured.append(self._steps))
    graphs = LayerGraphs(schedule=Replayed(), chunks=[], config=Settings())
    for step in range(5):
        call(graphs, [step])
        call(graphs, [step], forward_only=True)
    assert captured == [2]


def compiled():
    """Return outputs and gradients of an MLP before and after its activation is compiled."""
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config().finalize(1)
    layout = initialize(config)
    seed_everything(config.rng, layout)
    from mb_engine.model.compiled import compile_elementwise
    from mb_engine.model.gpt import build_model

    model = build_model(config, layout)[0]
    mlp = model.decoder.layers[0].mlp
    x = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(1))
    seen = []
    for _ in range(2):
        y = x.clone().requires_grad_()
        out, _ = mlp(y)
        out.square().sum().backward()
        seen.append((out.detach(), y.grad))
        before = mlp.activation_of
        count = compile_elementwise([model], backend="aot_eager")
    shutdown()
    with pytest.raises(EngineError, match=r"model\.torch_compile=True: .* set it to false"):
        compile_elementwise([torch.nn.Linear(2, 2)], backend="eager")
    return seen, count, mlp.activation_of is before


@pytest.mark.dist
def test_a_compiled_activation_gives_the_same_output_and_gradient():
    (plain, after), count, same = run_ranks(compiled, 1)[0]
    assert count == 4
    assert not same
    for a, b in zip(plain, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
