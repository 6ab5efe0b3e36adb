# SPDX-License-Identifier: Apache-2.0
"""Low precision is refused where it cannot be computed, with the nearest that can."""

from __future__ import annotations

import pytest
from mb_config import MixedPrecisionConfig
from mb_config.errors import UserError
from mb_engine.precision.support import Machine, check_engine_layers, check_precision
from mb_engine.testing import tiny_config
from packaging.version import Version

V100, A100, ADA, HOPPER, BLACKWELL = (7, 0), (8, 0), (8, 9), (9, 0), (10, 0)


def machine(capability, engine="2.9", megatron="0.16.1"):
    return Machine(
        capability=capability,
        engine=Version(engine) if engine else None,
        megatron=Version(megatron),
    )


def refused(name, there):
    config = tiny_config("dist.device=auto", f"mixed_precision={name}", "model.num_layers=32")
    with pytest.raises(UserError) as caught:
        check_precision(config.finalize(1), there)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "there", "needs", "instead"),
    [
        ("bf16_with_nvfp4_mixed", HOPPER, "compute capability 10.0 (Blackwell), this GPU has 9.0",
         "bf16_with_fp8_subchannel_scaling_mixed"),
        ("bf16_with_mxfp8_mixed", HOPPER, "compute capability 10.0",
         "bf16_with_fp8_subchannel_scaling_mixed"),
        ("fp16_with_mxfp8_mixed", ADA, "this GPU has 8.9", "fp16_with_fp8_current_scaling_mixed"),
        ("bf16_with_fp8_subchannel_scaling_mixed", ADA, "compute capability 9.0 (Hopper)",
         "bf16_with_fp8_current_scaling_mixed"),
        ("bf16_with_fp8_current_scaling_mixed", A100, "capability 8.9 (Ada), this GPU has 8.0",
         "bf16_mixed"),
        ("fp16_with_fp8_delayed_scaling_mixed", V100, "this GPU has 7.0", "fp16_mixed"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_too_old_says_what_is_needed_and_what_works(name, there, needs, instead):
    message = refused(name, machine(there))
    assert needs in message
    assert message.endswith(f"works here is mixed_precision={instead}")


def test_an_old_transformer_engine_is_named_with_the_version_needed():
    message = refused("bf16_with_fp8_current_scaling_mixed", machine(HOPPER, "2.0"))
    assert "needs Transformer Engine 2.2, installed is 2.0" in message
    assert message.endswith("bf16_with_fp8_delayed_scaling_mixed")


def test_without_cuda_or_transformer_engine_nothing_below_16_bits_works():
    message = refused("bf16_with_mxfp8_mixed", machine(None, engine=None))
    assert "a CUDA device and Transformer Engine 2.1, which is not installed" in message
    assert message.endswith("bf16_mixed")


def test_parameters_in_fp4_need_a_newer_megatron():
    old, new = machine(BLACKWELL), machine(BLACKWELL, megatron="0.19.2")
    assert "mixed_precision.fp4_param=True: needs megatron-core 0.19" in refused(
        "bf16_with_nvfp4_mixed", old
    )
    config = tiny_config("dist.device=auto", "mixed_precision=bf16_with_nvfp4_mixed")
    check_precision(config.finalize(1), new)


@pytest.mark.parametrize("precision", ["null", "fp32", "bf16_mixed", "fp16_mixed"])
def test_16_bits_and_more_run_everywhere(precision):
    config = tiny_config(f"mixed_precision={precision}").finalize(1)
    check_precision(config, machine(None, engine=None))


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("bf16_with_fp8_current_scaling_mixed", ADA),
        ("bf16_with_fp8_delayed_scaling_mixed", HOPPER),
        ("nanov2_bf16_with_fp8_current_scaling_mixed", HOPPER),
        ("bf16_with_mxfp8_mixed", BLACKWELL),
    ],
)
def test_what_the_machine_has_is_accepted(name, there):
    config = tiny_config("dist.device=auto", f"mixed_precision={name}")
    check_precision(config.finalize(1), machine(there))


def test_what_this_machine_has_is_looked_up():
    here = Machine.here()
    assert here.megatron >= Version("0.16")
    assert MixedPrecisionConfig().fp8 is None


OFFLOAD = "offload={cpu_offloading: true, cpu_offloading_num_layers: 2}"
DELAY = [
    "model.num_moe_experts=4",
    "model.expert_model_parallel_size=2",
    "model.moe_token_dispatcher_type=alltoall",
    "mixed_precision=bf16_mixed",
    "comm_overlap.overlap_moe_expert_parallel_comm=true",
    "comm_overlap.delay_wgrad_compute=true",
]


def test_layers_of_torch_refuse_what_only_transformer_engine_does():
    config = tiny_config("dist.device=auto", OFFLOAD).finalize(1)
    with pytest.raises(UserError, match=r"offload\.cpu_offloading=True: needs Transformer Engine"):
        check_engine_layers(config, "torch", machine(HOPPER))
    check_engine_layers(tiny_config().finalize(1), "torch", machine(HOPPER))


def test_offloading_of_activations_asks_for_the_interface_that_megatron_uses(monkeypatch):
    monkeypatch.delenv("NVTE_CPU_OFFLOAD_V1", raising=False)
    config = tiny_config("dist.device=auto", OFFLOAD).finalize(1)
    with pytest.raises(UserError, match=r"set env_vars\.NVTE_CPU_OFFLOAD_V1=1"):
        check_engine_layers(config, "te", machine(HOPPER, "2.10"))
    check_engine_layers(config, "te", machine(HOPPER, "2.9"))
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    check_engine_layers(config, "te", machine(HOPPER, "2.10"))


def test_late_weight_gradients_need_a_newer_transformer_engine():
    config = tiny_config("dist.device=auto", *DELAY).finalize(2)
    with pytest.raises(UserError, match=r"needs Transformer Engine 2\.7, installed is 2\.6"):
        check_engine_layers(config, "te", machine(HOPPER, "2.6"))
    check_engine_layers(config, "te", machine(HOPPER, "2.7"))
