"""Configs of published models, with as many weights as the Hub counts in their files.

The counts come from the pages of the models and not from the code under test: a wrong width, a
missing bias or norm, or a head that is not tied would show in the last digits. Keys that do not
touch the maths are left out, and the divisors of Phi-4-mini are stand-ins for its 96.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from tidegate.errors import BundleError
from tidegate.model.architecture import Architecture
from tidegate.model.registry import describe
from tidegate.model.roles import roles
from tidegate.model.strict_json import read

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "rope_theta": 1000000.0,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_theta": 1000000.0,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "attention_bias": False,
        },
    ),
    "Phi-4-mini": (
        3_836_021_760,
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 200064,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.5] * 48,
            },
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 6912,
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
        },
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 11008,
            "vocab_size": 128256,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "layer_types": ["full_attention"] * 36,
            "sliding_window": None,
            "use_sliding_window": False,
            "rope_theta": 5000000.0,
            "rope_scaling": None,
            "mlp_bias": False,
            "attention_bias": False,
        },
    ),
    "granite-3.1-2b": (
        2_533_531_648,
        {
            "model_type": "granite",
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 49155,
            "max_position_embeddings": 131072,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "rope_theta": 5000000.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
        },
    ),
    "OLMo-2-1B": (
        1_484_916_736,
        {
            "model_type": "olmo2",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 8192,
            "vocab_size": 100352,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-06,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
    ),
}


def published(name: str) -> Architecture:
    arch = describe(PUBLISHED[name][1])
    assert isinstance(arch, Architecture)
    return arch


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_weights_as_the_hub_counts(name: str) -> None:
    found = roles(published(name)).values()
    weights = sum(math.prod(role.shape) + (role.shape[0] if role.bias else 0) for role in found)
    assert weights == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bundle_keeps_all_that_was_read(name: str) -> None:
    arch = published(name)
    kept = json.loads(json.dumps(asdict(arch)))
    assert read(Architecture, kept, "manifest.json", BundleError) == arch


def test_gemma_3_sees_everything_in_every_sixth_layer() -> None:
    arch = published("gemma-3-1b")
    full = [i for i in range(arch.layers) if arch.attention(i).window is None]
    assert full == [5, 11, 17, 23]
    fast, slow = arch.attention(0).rope, arch.attention(5).rope
    assert fast is not None
    assert slow is not None
    assert fast.frequencies[-1] > 50 * slow.frequencies[-1]


def test_gemma_2_has_a_window_in_every_other_layer() -> None:
    arch = published("gemma-2-2b")
    assert [arch.attention(i).window for i in range(4)] == [4096, None, 4096, None]
    assert (arch.attention_softcap, arch.head_softcap) == (50.0, 30.0)


def test_smollm3_leaves_every_fourth_layer_unrotated() -> None:
    arch = published("SmolLM3-3B")
    plain = [i for i in range(arch.layers) if arch.attention(i).rope is None]
    assert plain == list(range(3, 36, 4))


def test_phi_4_mini_rotates_three_quarters_of_a_head() -> None:
    rope = published("Phi-4-mini").attention(0).rope
    assert rope is not None
    assert rope.size == 96
    # sqrt(1 + ln(131072 / 4096) / ln(4096)), the formula of the LongRoPE paper.
    assert rope.magnitude == pytest.approx(1.1902380714)


def test_a_model_can_be_served_with_less_than_it_was_trained_for() -> None:
    config = PUBLISHED["Phi-4-mini"][1]
    short, long = describe(config, 4096), describe(config)
    assert isinstance(short, Architecture)
    assert short.context == 4096
    # The short divisors are all 1, the long ones 1.5.
    assert short.attention(0).rope != published("Phi-4-mini").attention(0).rope
    assert long.context == 131072
