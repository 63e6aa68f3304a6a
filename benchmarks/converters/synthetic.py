"""A Llama-shaped checkpoint of random bfloat16 weights, written shard by shard.

The shape is that of TinyLlama-1.1B. Conversion costs the same whatever the values are, so no
weights need to be fetched to measure it. What such a model would generate is noise.

    python benchmarks/converters/synthetic.py FOLDER --layers 22
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tidegate.model.safetensors_writer import write_safetensors

WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCAB, CONTEXT_TOKENS = 2048, 5632, 32, 4, 64, 32_000, 2048
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
DEVIATION = np.float32(0.02)

Tensors = dict[str, npt.NDArray[np.generic]]


def write_checkpoint(folder: Path, layers: int) -> Path:
    """Write config, tokenizer and one shard per layer; the largest table is held, as float32."""
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards(layers)):
        file = f"model-{number + 1:05}-of-{layers + 2:05}.safetensors"
        write_safetensors(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    body = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def shards(layers: int) -> Iterator[Tensors]:
    """Table, layers, head and last norm, each a file of its own."""
    rng = np.random.default_rng(0)
    yield {"model.embed_tokens.weight": noise(rng, VOCAB, WIDTH)}
    for layer in range(layers):
        yield {
            f"model.layers.{layer}.{name}.weight": noise(rng, *shape)
            for name, shape in layer_shapes().items()
        }
    yield {
        "lm_head.weight": noise(rng, VOCAB, WIDTH),
        "model.norm.weight": noise(rng, WIDTH),
    }


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of one layer."""
    return {
        "input_layernorm": (WIDTH,),
        "self_attn.q_proj": (HEADS * HEAD, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD),
        "post_attention_layernorm": (WIDTH,),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }


def noise(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.generic]:
    """Normal values; around 1 for the vectors, which are norms."""
    values = rng.standard_normal(shape, np.float32) * DEVIATION
    if len(shape) == 1:
        values += 1
    return values.astype(ml_dtypes.bfloat16)


def config(layers: int) -> dict[str, object]:
    """`config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def tokenizer() -> Tokenizer:
    """Bytes as tokens: a converter copies it and looks no further."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def main() -> int:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--layers", type=int, default=22)
    args = parser.parse_args()
    write_checkpoint(args.folder, args.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
