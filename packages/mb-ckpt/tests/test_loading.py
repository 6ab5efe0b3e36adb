# SPDX-License-Identifier: Apache-2.0
"""Part of a step, under other names, in other dtypes, into modules without memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from torch import nn


class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture(params=["packed", "zarr"])
def saved(request, tmp_path):
    """A store with one step of a model, its optimizer and a counter; the model and optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    with CheckpointStore(tmp_path, layout=request.param) as store:
        store.save(1, {"model": model, "optimizer": optimizer, "n": 3}).result()
        yield store, model, optimizer


def fresh():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_what_begins_with_a_prefix_is_filled(saved):
    store, model, _ = saved
    other = fresh()
    untouched = other[2].weight.clone()
    optimizer = torch.optim.AdamW(other.parameters())
    loaded = store.load({"model": other, "optimizer": optimizer}, only=["model.0.", "model.1."])
    assert equal(other[:2].state_dict().values(), model[:2].state_dict().values())
    assert torch.equal(other[2].weight, untouched)
    assert not optimizer.state_dict()["state"]
    assert loaded == {"model": {}, "optimizer": loaded["optimizer"], "n": 3}
    assert sorted(loaded.filled) == [
        "model.0.bias", "model.0.weight", "model.1.bias", "model.1.num_batches_tracked",
        "model.1.running_mean", "model.1.running_var", "model.1.weight",
    ]  # fmt: skip
    assert (loaded.missing, loaded.unexpected, loaded.step) == ((), (), 1)
    assert loaded.place.endswith("step_00000001")


def test_names_may_differ(saved):
    store, model, optimizer = saved
    other = nn.ModuleDict(
        {"first": nn.Linear(5, 7), "norm": nn.BatchNorm1d(7), "last": nn.Linear(7, 2)}
    )
    opt = torch.optim.AdamW(other.parameters())
    store.load(
        {"net": other, "opt": opt},
        rename={"net.": "model.", "net.first.": "model.0.", "net.norm.": "model.1.",
                "net.last.": "model.2.", "opt": "optimizer"},
    )  # fmt: skip
    assert equal(other.state_dict().values(), model.state_dict().values())
    mine, theirs = opt.state_dict()["state"], optimizer.state_dict()["state"]
    assert equal((v["exp_avg"] for v in mine.values()), (v["exp_avg"] for v in theirs.values()))
    with pytest.raises(
        CheckpointError, match=r"'net' is not the module that was saved: .* lacks net\."
    ):
        store.load({"net": other}, rename={"net": "modle"})


def test_missing_and_unexpected_keys_are_refused_or_listed_exactly(saved):
    store, model, _ = saved
    larger = nn.Sequential(*fresh()[:2], nn.Linear(7, 3), nn.Linear(3, 1))
    before = larger[3].weight.detach().clone()
    state = {"model": {"0": larger[0], "3": larger[3]}, "lost": torch.optim.SGD([before], lr=1.0)}
    with pytest.raises(CheckpointError, match=r"lacks 'lost', the state of a SGD"):
        store.load(state)
    loaded = store.load(state, missing="ignore")
    assert loaded.missing == ("lost", "model.3.weight", "model.3.bias")
    assert torch.equal(larger[0].weight, model[0].weight)
    assert torch.equal(larger[3].weight, before)
    assert loaded.unexpected == ()

    loaded = store.load({"model": nn.Sequential(larger[0])}, unexpected="ignore")
    stored = [f"model.{k}" for k in model.state_dict() if not k.startswith("0.")]
    assert [key for key in loaded.unexpected if key.startswith("model.")] == stored
    with pytest.raises(CheckpointError, match=r"the module lacks model\.1\.bias, model\.1\.num"):
        store.load({"model": nn.Sequential(larger[0])})

    weight = torch.zeros(7, 5)
    partial = {"model": {"0": {"weight": weight}}}
    with pytest.raises(CheckpointError, match=r"nothing asks for model\.0\.bias, .* and \d+ more"):
        store.load(partial, unexpected="error")
    assert (weight == 0).all()
    with pytest.raises(CheckpointError, match=r"nothing asks for model\.0\.bias of"):
        store.load(partial, unexpected="error", only="model.0.")
    assert store.load(partial, unexpected="error", only="model.0.w").filled == ("model.0.weight",)


def test_values_are_cast_only_if_asked_to(saved, monkeypatch):
    from mb_ckpt.loading import matching as loading

    store, model, _ = saved
    monkeypatch.setattr(loading, "_CAST_BYTES", 100)  # several batches
    half = fresh().to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"model.0.weight is float32\[7, 5\] there, bfloat16"):
        store.load({"model": half})
    store.load({"model": half}, cast=True)
    for mine, stored in zip(half.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, stored.to(mine.dtype))
    with pytest.raises(CheckpointError, match=r"float32\[7, 5\] there, bfloat16\[7, 4\] here"):
        store.load({"model": {"0": {"weight": torch.zeros(7, 4).bfloat16()}}}, cast=True)


def test_complex_values_are_not_cast_to_real_ones(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": torch.ones(2, dtype=torch.complex64)})
        with pytest.raises(CheckpointError, match=r"cannot be cast to torch\.float32"):
            store.load({"w": torch.ones(2)}, cast=True)


def test_modules_on_meta_get_memory_and_ties_stay(tmp_path):
    model = Tied()
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"m": model})
        with torch.device("meta"):
            empty = Tied()
            wrong = Tied(width=7)
        with pytest.raises(CheckpointError, match=r"float32\[9, 6\] there, float32\[9, 7\] here"):
            store.load({"m": wrong})
        assert wrong.embed.weight.is_meta
        store.load({"m": empty}, device="cpu")
    assert empty.head.weight is empty.embed.weight
    assert isinstance(empty.embed.weight, nn.Parameter)
    assert empty.embed.weight.requires_grad
    assert equal(empty.state_dict().values(), model.state_dict().values())
    assert not any(p.is_meta for p in empty.parameters())


def test_a_buffer_on_meta_that_no_checkpoint_has_is_refused(tmp_path):
    class Rotary(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("angles", torch.ones(3), persistent=False)

    with CheckpointStore(tmp_path) as store:
        store.save(1, {"m": Rotary()})
        with torch.device("meta"):
            empty = Rotary()
        with pytest.raises(CheckpointError, match=r"m\.angles is on meta and in no checkpoint"):
            store.load({"m": empty})
        assert empty.weight.is_meta


def test_numpy_arrays_are_stored_and_filled_in_place(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    room = np.zeros((3, 4))
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"a": array, "s": np.float32(0.5)})
        assert store.load({"a": room}) == {"s": 0.5}
        assert np.array_equal(room, array)
        array.setflags(write=False)
        with pytest.raises(CheckpointError, match=r"'a' is a numpy array .* writeable=False"):
            store.save(2, {"a": array})


@pytest.mark.parametrize("setting", [{"missing": "x"}, {"unexpected": "x"}])
def test_unknown_policies_are_refused(tmp_path, setting):
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match="='x': expected"):
        store.load({}, **setting)
