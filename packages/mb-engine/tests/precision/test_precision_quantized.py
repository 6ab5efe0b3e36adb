# SPDX-License-Identifier: Apache-2.0
"""Parameters in FP8 and scaling histories pass through a checkpoint.

Transformer Engine needs a GPU. Here a tensor that keeps integers and a scale, and a module with
TE's names for its state, stand in for its own, behind the functions that tell them apart.
"""

from __future__ import annotations

import io
import types

import pytest
import torch
from mb_config.records import ProcessLayout
from mb_engine.errors import EngineError
from mb_engine.precision import quantized
from torch import nn

SCALE = 1 / 64


class Integers(torch.Tensor):
    """A tensor of multiples of a scale, as FP8 tensors are."""

    @classmethod
    def of(cls, values):
        return torch.Tensor._make_subclass(cls, (values / SCALE).round())

    def dequantize(self):
        return self.as_subclass(torch.Tensor).detach() * SCALE

    def copy_(self, source, non_blocking=False):
        self.as_subclass(torch.Tensor).copy_((source / SCALE).round(), non_blocking)
        return self


class Linear(nn.Module):
    """TE's names: ``fp8_meta``, and a state of unequal lengths that pickles itself."""

    def __init__(self, history):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self._parameters["weight"] = Integers.of(torch.linspace(-1, 1, 16).view(4, 4))
        self.fp8_meta, self.history = {}, history

    def get_extra_state(self):
        if self.history is None:
            return None
        buffer = io.BytesIO()
        torch.save(self.history, buffer)
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None:
            self.history = None
            return
        self.history = torch.load(io.BytesIO(state.numpy().tobytes()), weights_only=True)


class Layer(nn.Module):
    def __init__(self, number, history):
        super().__init__()
        self.layer_number = number
        self.linear_qkv = Linear(history)


class Chunk(nn.Module):
    def __init__(self, first, histories):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(first + place + 1, history) for place, history in enumerate(histories)
        )


@pytest.fixture(autouse=True)
def integers_count_as_quantized(monkeypatch):
    monkeypatch.setattr(quantized, "is_quantized", lambda tensor: isinstance(tensor, Integers))


def layout(**ranks):
    place = types.SimpleNamespace(tp_rank=0, dp_rank=0, cp_rank=0)
    place.__dict__.update(ranks)
    assert set(vars(place)) <= {a.name for a in ProcessLayout.__attrs_attrs__}
    return place


def test_plain_copies_stand_in_and_what_is_loaded_into_them_comes_back():
    model = Chunk(0, [None])
    parameter = model.layers[0].linear_qkv._parameters["weight"]
    with quantized.plain_parameters([model]) as copies:
        inside = model.layers[0].linear_qkv.weight
        assert type(inside) is nn.Parameter
        assert inside is copies[0]
        torch.testing.assert_close(inside.data, parameter.dequantize())
        inside.data.fill_(0.5)
    assert model.layers[0].linear_qkv._parameters["weight"] is parameter
    assert float(parameter.dequantize()[0, 0]) == -1.0  # not yet
    quantized.quantize_again(copies)
    assert (parameter.dequantize() == 0.5).all()


def test_copies_are_taken_back_after_an_error():
    model = Chunk(0, [None])
    parameter = model.layers[0].linear_qkv._parameters["weight"]
    with pytest.raises(KeyError), quantized.plain_parameters([model]):
        raise KeyError
    assert model.layers[0].linear_qkv._parameters["weight"] is parameter


def test_histories_follow_the_global_layer_into_another_pipeline_stage():
    """Layers 2 and 3 are the second stage of two; another run holds all four on one."""
    histories = [torch.rand(16) for _ in range(4)]
    stages = [Chunk(0, histories[:2]), Chunk(2, histories[2:])]
    saved = {}
    for stage in stages:
        saved |= quantized.history_shards([stage], layout(), length=16)
    assert sorted(saved) == [f"fp8.layers.{n}.linear_qkv" for n in range(4)]
    other = Chunk(0, [None] * 4)
    wanted = quantized.history_shards([other], layout(), length=16)
    assert wanted.keys() == saved.keys()
    for key, shard in wanted.items():
        assert shard.global_shape == saved[key].global_shape
        shard.data.copy_(saved[key].data)
    quantized.load_history([other], wanted)
    for layer, history in zip(other.layers, histories, strict=True):
        assert torch.equal(layer.linear_qkv.history, history)


def test_a_module_that_has_not_run_stays_without_history():
    model = Chunk(0, [torch.rand(4)])
    empty = quantized.history_shards([Chunk(0, [None])], layout(), length=4)
    quantized.load_history([model], empty)
    assert model.layers[0].linear_qkv.history is not None


def test_one_rank_writes_what_all_have():
    model = Chunk(0, [torch.rand(4)])
    for place, replica in ((layout(), 0), (layout(tp_rank=1), 1), (layout(dp_rank=1), 1)):
        shards = quantized.history_shards([model], place, length=4)
        assert [s.replica_id for s in shards.values()] == [replica]


def test_a_history_that_does_not_fit_is_an_error():
    with pytest.raises(EngineError, match=r"layers\.0\.linear_qkv: its FP8 state has \d+ bytes"):
        quantized.history_shards([Chunk(0, [torch.rand(100_000)])], layout(), length=4)
