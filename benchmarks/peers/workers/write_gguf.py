"""Writes a checkpoint of random weights as GGUF and has llama.cpp quantise it to Q4_0.

Runs in the peer's own environment. Names and layout are llama.cpp's: rows of query and key are
reordered for a rotation of neighbours where the architecture wants it. There is no tokenizer in
the file, because the benchmark brings token ids. Quantising is `llama-quantize`'s own work, so the
head is Q6_K (or Q8_0 where the width is no multiple of 256), as in the files that people fetch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

# `llama` rotates neighbours and wants its rows in that order; the others rotate halves.
_NEIGHBOURS = {"llama"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, as float32; bfloat16 is the upper half of one."""
    for path in sorted(folder.glob("*.safetensors")):
        header_bytes = int(np.fromfile(path, np.uint64, 1)[0])
        header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
        data = np.memmap(path, np.uint8, "r", 8 + header_bytes)
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", entry
                first, last = entry["data_offsets"]
                halves = np.asarray(data[first:last]).view(np.uint16).astype(np.uint32)
                yield name, (halves << 16).view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    layer, role = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[role]}.{kind}"


def neighbours(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from two halves to pairs."""
    rows = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


def write(folder: Path, path: Path) -> None:
    """The whole model: matrices as float16, vectors as float32."""
    config = json.loads((folder / "config.json").read_text())
    kind, heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_F16)
    for name, values in tensors(folder):
        if kind in _NEIGHBOURS and ".q_proj" in name:
            values = neighbours(values, heads)
        if kind in _NEIGHBOURS and ".k_proj" in name:
            values = neighbours(values, config["num_key_value_heads"])
        width = np.float16 if values.ndim == 2 else np.float32
        writer.add_tensor(gguf_name(name), values.astype(width))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, path: Path) -> None:
    """Q4_0, as `llama-quantize` makes it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.nthread = 2
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source}")


def step_bytes(path: Path) -> int:
    """All tensors, but not the table where there is a head beside it."""
    found = {one.name: int(one.n_bytes) for one in gguf.GGUFReader(str(path)).tensors}
    tied = "output.weight" not in found
    return sum(count for name, count in found.items() if tied or name != "token_embd.weight")


def main() -> None:
    """Arguments: checkpoint, file to write."""
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    whole = out.with_suffix(".f16")
    write(checkpoint, whole)
    quantise(whole, out)
    whole.unlink()
    print(json.dumps({"step_bytes": step_bytes(out)}))


if __name__ == "__main__":
    main()
