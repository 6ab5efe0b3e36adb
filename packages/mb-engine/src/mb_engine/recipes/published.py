# SPDX-License-Identifier: Apache-2.0
"""Models as their makers published them: what of ``config.json`` decides the architecture."""

from __future__ import annotations

from typing import Any

from attrs import frozen


@frozen
class Published:
    """A model that recipes are for.

    Attributes:
        hub: Its name on the Hugging Face hub.
        family: Name of its family.
        parameters: How many its maker's weights have, tied ones counted once.
        config: Entries of ``config.json``.
    """

    hub: str
    family: str
    parameters: int
    config: dict[str, Any]


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, *, head: int | None = None
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head or hidden // heads,
    }


def _llama(hub: str, parameters: int, factor: float, *sizes: int, **more: Any) -> Published:
    config = _sizes(*sizes, head=more.pop("head", None)) | {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    return Published(f"meta-llama/{hub}", "llama", parameters, config | more)


def _qwen(hub: str, family: str, parameters: int, *sizes: int, **more: Any) -> Published:
    config = _sizes(*sizes, head=more.pop("head", None)) | {
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
    }
    return Published(f"Qwen/{hub}", family, parameters, config | more)


def _qwen25(size: str, parameters: int, *sizes: int, **more: Any) -> Published:
    return _qwen(f"Qwen2.5-{size}", "qwen2", parameters, *sizes, **more)


def _qwen3(size: str, parameters: int, *sizes: int, **more: Any) -> Published:
    return _qwen(f"Qwen3-{size}", "qwen3", parameters, *sizes, head=128, **more)


def _qwen3_moe(size: str, parameters: int, width: int, *sizes: int) -> Published:
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }
    return _qwen(f"Qwen3-{size}", "qwen3_moe", parameters, *sizes, head=128, **experts)


def _mistral(hub: str, family: str, parameters: int, vocab: int, **more: Any) -> Published:
    config = _sizes(4096, 14_336, 32, 32, 8) | {
        "vocab_size": vocab,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
    }
    return Published(f"mistralai/{hub}", family, parameters, config | more)


def _gemma2(size: str, parameters: int, scalar: int, *sizes: int, head: int = 256) -> Published:
    config = _sizes(*sizes, head=head) | {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    return Published(f"google/gemma-2-{size}", "gemma2", parameters, config)


def _gemma3(size: str, parameters: int, scalar: int, *sizes: int, **more: Any) -> Published:
    config = _sizes(*sizes, head=more.pop("head", 256)) | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return Published(f"google/gemma-3-{size}-pt", "gemma3", parameters, config | more)


_TIED = {"tie_word_embeddings": True}
_LONG = {"max_position_embeddings": 131_072}
_WIDE = {"vocab_size": 152_064} | _LONG
_COARSE = {"rms_norm_eps": 1e-5} | _WIDE

PUBLISHED: dict[str, Published] = {
    "llama3_2_1b": _llama("Llama-3.2-1B", 1_235_814_400, 32.0, 2048, 8192, 16, 32, 8, **_TIED),
    "llama3_2_3b": _llama("Llama-3.2-3B", 3_212_749_824, 32.0, 3072, 8192, 28, 24, 8, **_TIED),
    "llama3_1_8b": _llama("Llama-3.1-8B", 8_030_261_248, 8.0, 4096, 14_336, 32, 32, 8),
    "llama3_1_70b": _llama("Llama-3.1-70B", 70_553_706_496, 8.0, 8192, 28_672, 80, 64, 8),
    "llama3_1_405b": _llama("Llama-3.1-405B", 405_853_388_800, 8.0, 16_384, 53_248, 126, 128, 8),
    "qwen2_5_0_5b": _qwen25("0.5B", 494_032_768, 896, 4864, 24, 14, 2, **_TIED),
    "qwen2_5_1_5b": _qwen25("1.5B", 1_543_714_304, 1536, 8960, 28, 12, 2, **_TIED, **_LONG),
    "qwen2_5_3b": _qwen25("3B", 3_085_938_688, 2048, 11_008, 36, 16, 2, **_TIED),
    "qwen2_5_7b": _qwen25("7B", 7_615_616_512, 3584, 18_944, 28, 28, 4, **_WIDE),
    "qwen2_5_14b": _qwen25("14B", 14_770_033_664, 5120, 13_824, 48, 40, 8, **_COARSE),
    "qwen2_5_32b": _qwen25("32B", 32_763_876_352, 5120, 27_648, 64, 40, 8, **_COARSE),
    "qwen2_5_72b": _qwen25("72B", 72_706_203_648, 8192, 29_568, 80, 64, 8, **_COARSE),
    "qwen3_0_6b": _qwen3("0.6B", 596_049_920, 1024, 3072, 28, 16, 8, **_TIED),
    "qwen3_1_7b": _qwen3("1.7B", 1_720_574_976, 2048, 6144, 28, 16, 8, **_TIED),
    "qwen3_4b": _qwen3("4B", 4_022_468_096, 2560, 9728, 36, 32, 8, **_TIED),
    "qwen3_8b": _qwen3("8B", 8_190_735_360, 4096, 12_288, 36, 32, 8),
    "qwen3_14b": _qwen3("14B", 14_768_307_200, 5120, 17_408, 40, 40, 8),
    "qwen3_32b": _qwen3("32B", 32_762_123_264, 5120, 25_600, 64, 64, 8),
    "qwen3_30b_a3b": _qwen3_moe("30B-A3B", 30_532_122_624, 768, 2048, 6144, 48, 32, 4),
    "qwen3_235b_a22b": _qwen3_moe("235B-A22B", 235_093_634_560, 1536, 4096, 12_288, 94, 64, 4),
    "mistral_7b": _mistral("Mistral-7B-v0.3", "mistral", 7_248_023_552, 32_768),
    "mixtral_8x7b": _mistral(
        "Mixtral-8x7B-v0.1",
        "mixtral",
        46_702_792_704,
        32_000,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "gemma2_2b": _gemma2("2b", 2_614_341_888, 256, 2304, 9216, 26, 8, 4),
    "gemma2_9b": _gemma2("9b", 9_241_705_984, 256, 3584, 14_336, 42, 16, 8),
    "gemma2_27b": _gemma2("27b", 27_227_128_320, 144, 4608, 36_864, 46, 32, 16, head=128),
    "gemma3_1b": _gemma3(
        "1b",
        999_885_952,
        256,
        1152,
        6912,
        26,
        4,
        1,
        vocab_size=262_144,
        max_position_embeddings=32_768,
        sliding_window=512,
        rope_scaling=None,
    ),
    "gemma3_4b": _gemma3("4b", 3_880_263_168, 256, 2560, 10_240, 34, 8, 4),
    "gemma3_12b": _gemma3("12b", 11_766_034_176, 256, 3840, 15_360, 48, 16, 8),
    "gemma3_27b": _gemma3("27b", 27_009_346_304, 168, 5376, 21_504, 62, 32, 16, head=128),
}
"""By the first part of a recipe's name; of Gemma 3, the text model alone."""
