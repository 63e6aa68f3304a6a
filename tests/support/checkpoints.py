"""Writes small Hugging Face checkpoint folders for tests: random weights, a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear
from tidegate.model.registry import architecture_module
from tidegate.model.roles import roles
from tidegate.model.walk import Weights

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def bfloat16_bytes(values: np.ndarray) -> bytes:
    """Round to nearest even, as torch does, and keep the upper half."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype("<u2").tobytes()


def safetensors_bytes(tensors: dict[str, np.ndarray], *, dtype: str = "BF16") -> bytes:
    """A safetensors file of `tensors`, as BF16, F16 or F32."""
    header: dict[str, object] = {}
    body = b""
    for name, values in tensors.items():
        if dtype == "BF16":
            data = bfloat16_bytes(values)
        else:
            data = values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        body += data
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


def llama_config(arch: Architecture) -> dict[str, object]:
    """The `config.json` that `architectures.llama.describe` reads back as `arch`."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": arch.width,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_size,
        "intermediate_size": arch.inner,
        "vocab_size": arch.vocab,
        "max_position_embeddings": arch.context,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": 10000.0,
        "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.mlp_bias,
        "tie_word_embeddings": arch.tied_head,
        "hidden_act": "silu",
        "eos_token_id": 1,
    }


def byte_tokenizer(vocab: int) -> Tokenizer:
    """Bytes as tokens, cut to what fits `vocab` beside the special ones; unknown bytes vanish."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab - len(SPECIAL)]
    ids = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def checkpoint_tensors(arch: Architecture, weights: Weights) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by its Hugging Face name."""
    tensors: dict[str, np.ndarray] = {}
    sources = architecture_module(arch.model_type).sources(arch, ())
    for name, role in roles(arch).items():
        tensor = sources[name].tensor
        if not role.is_linear:
            tensors[tensor] = weights.vector(name)
            continue
        linear = weights.linear(name)
        assert isinstance(linear, DenseLinear)
        tensors[tensor] = linear.weight
        if linear.bias is not None:
            tensors[tensor.removesuffix("weight") + "bias"] = linear.bias
    return tensors


def write_checkpoint(
    folder: Path, arch: Architecture, weights: Weights, *, shards: int = 1
) -> Path:
    """Write a complete checkpoint folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(arch, weights)
    names = sorted(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    else:
        index: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            (folder / file).write_bytes(safetensors_bytes(part))
            index |= dict.fromkeys(part, file)
        body = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(body))
    (folder / "config.json").write_text(json.dumps(llama_config(arch)))
    byte_tokenizer(arch.vocab).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder
