"""A checkpoint of random bfloat16 weights in a published shape, written shard by shard.

Conversion and inference cost the same whatever the values are, so no weights need to be fetched to
measure them. What such a model generates is noise.

    python benchmarks/converters/synthetic.py FOLDER --shape tinyllama-1.1b --layers 22
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tidegate.model.safetensors_writer import write_safetensors

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
DEVIATION = np.float32(0.02)

Tensors = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a config says about sizes; `model_type` says the rest."""

    model_type: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    context_tokens: int
    rope_theta: float
    epsilon: float
    tied: bool


SHAPES: Mapping[str, Shape] = {
    "tinyllama-1.1b": Shape(
        model_type="llama",
        layers=22,
        width=2048,
        inner=5632,
        heads=32,
        kv_heads=4,
        head=64,
        vocab=32_000,
        context_tokens=2048,
        rope_theta=10_000.0,
        epsilon=1e-5,
        tied=False,
    ),
    "qwen2.5-0.5b": Shape(
        model_type="qwen2",
        layers=24,
        width=896,
        inner=4864,
        heads=14,
        kv_heads=2,
        head=64,
        vocab=151_936,
        context_tokens=32_768,
        rope_theta=1_000_000.0,
        epsilon=1e-6,
        tied=True,
    ),
    "qwen3-1.7b": Shape(
        model_type="qwen3",
        layers=28,
        width=2048,
        inner=6144,
        heads=16,
        kv_heads=8,
        head=128,
        vocab=151_936,
        context_tokens=40_960,
        rope_theta=1_000_000.0,
        epsilon=1e-6,
        tied=True,
    ),
    "tiny": Shape(
        model_type="llama",
        layers=2,
        width=128,
        inner=256,
        heads=2,
        kv_heads=1,
        head=64,
        vocab=512,
        context_tokens=2048,
        rope_theta=10_000.0,
        epsilon=1e-5,
        tied=False,
    ),
}
"""From the config.json that each model is published with; `tiny` is for trying a benchmark."""


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write config, tokenizer and one shard per layer; the largest table is held, as float32."""
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards(shape)):
        file = f"model-{number + 1:05}-of-{shape.layers + 2:05}.safetensors"
        write_safetensors(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    body = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))
    return folder


def shards(shape: Shape) -> Iterator[Tensors]:
    """Table, layers, head and last norm, each a file of its own."""
    rng = np.random.default_rng(0)
    yield {"model.embed_tokens.weight": noise(rng, shape.vocab, shape.width)}
    for layer in range(shape.layers):
        yield {
            f"model.layers.{layer}.{name}": noise(rng, *size)
            for name, size in layer_shapes(shape).items()
        }
    head = {} if shape.tied else {"lm_head.weight": noise(rng, shape.vocab, shape.width)}
    yield {**head, "model.norm.weight": noise(rng, shape.width)}


def layer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer."""
    query, cached, width = shape.heads * shape.head, shape.kv_heads * shape.head, shape.width
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (query, width),
        "self_attn.k_proj.weight": (cached, width),
        "self_attn.v_proj.weight": (cached, width),
        "self_attn.o_proj.weight": (width, query),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (shape.inner, width),
        "mlp.up_proj.weight": (shape.inner, width),
        "mlp.down_proj.weight": (width, shape.inner),
    }
    if shape.model_type == "qwen2":
        sizes = {"q": query, "k": cached, "v": cached}
        found |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if shape.model_type == "qwen3":
        found |= {f"self_attn.{name}_norm.weight": (shape.head,) for name in ("q", "k")}
    return found


def noise(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.generic]:
    """Normal values; around 1 for the vectors, which are norms and biases."""
    values = rng.standard_normal(shape, np.float32) * DEVIATION
    if len(shape) == 1:
        values += 1
    return values.astype(ml_dtypes.bfloat16)


def config(shape: Shape) -> dict[str, object]:
    """`config.json`."""
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{names[shape.model_type]}ForCausalLM"],
        "model_type": shape.model_type,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def tokenizer(vocab: int) -> Tokenizer:
    """Bytes as tokens, and words that no text becomes but that decode to text, up to `vocab`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("".join(letters) for letters in product(ascii_lowercase, repeat=4))
    tokens = ["<s>", "</s>", *alphabet]
    tokens += [f"Ġ{next(words)}" for _ in range(vocab - len(tokens))]
    ids = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def main() -> int:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="other than the shape has")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    layers = shape.layers if args.layers is None else args.layers
    write_checkpoint(args.folder, replace(shape, layers=layers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
