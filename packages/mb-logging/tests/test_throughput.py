# SPDX-License-Identifier: Apache-2.0
"""Rates against their formulas, peaks against the data sheets."""

from __future__ import annotations

import pytest
from mb_logging import ThroughputWindow, model_flops_utilization, peak_tflops


def test_the_rate_is_over_the_last_steps_only():
    window = ThroughputWindow(3, flops_per_token=6e9, num_devices=4)
    assert window.throughput() is None
    window.add(99_999, now=50.0)
    assert window.throughput() is None
    now = 50.0
    for tokens, seconds in ((100, 10.0), (200, 1.0), (400, 2.0), (600, 1.0)):
        now += seconds
        window.add(tokens, now=now)
    rate = window.throughput()
    assert rate.tokens_per_second == pytest.approx((200 + 400 + 600) / 4.0)
    assert rate.tflops_per_device == pytest.approx(300.0 * 6e9 / 4 / 1e12)


def test_other_work_does_not_slow_it_down():
    window = ThroughputWindow(10)
    window.add(0, now=0.0)
    window.add(100, now=1.0)
    window.exclude(30.0)
    window.add(100, now=32.0)
    assert window.throughput().tokens_per_second == pytest.approx(100.0)
    assert window.throughput().tflops_per_device == 0.0


def test_a_clock_that_stands_still_gives_no_rate():
    window = ThroughputWindow(10)
    window.add(0, now=1.0)
    window.add(5, now=1.0)
    assert window.throughput() is None


@pytest.mark.parametrize("bad", [{"size": 0}, {"num_devices": 0}])
def test_sizes_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=0"):
        ThroughputWindow(**bad)


@pytest.mark.parametrize(
    ("device", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H100 NVL", 835.5, 1671.0),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA H20", 148.0, 296.0),
        ("NVIDIA GH200 480GB", 989.4, 1978.9),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA GB200", 2500.0, 5000.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA A100 80GB PCIe", 312.0, None),
        ("NVIDIA A10", 125.0, None),
        ("NVIDIA L40S", 362.05, 733.0),
        ("NVIDIA L4", 121.0, 242.0),
        ("Tesla V100-SXM2-32GB", 125.0, None),
        ("NVIDIA GeForce RTX 4090", 165.2, 330.3),
        ("NVIDIA A10G", None, None),
        ("CPU (x86_64)", None, None),
        ("", None, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(device, bf16, fp8):
    assert peak_tflops(device) == bf16
    assert peak_tflops(device, "fp8") == fp8


def test_utilization_is_the_share_of_the_peak():
    assert model_flops_utilization(400.0, "NVIDIA H100 80GB HBM3") == pytest.approx(400 / 989.4)
    assert model_flops_utilization(400.0, "NVIDIA H100 80GB HBM3", "fp8") == pytest.approx(
        400 / 1978.9
    )
    assert model_flops_utilization(400.0, "CPU (x86_64)") is None
