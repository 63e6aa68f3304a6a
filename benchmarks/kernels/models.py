"""Models of published shapes with random weights, which cost what trained ones do.

They are drawn on the device, so nothing has to be read nor sent there; what the host is asked for
are windows into one short run of random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tidegate.engine.text import TextModel
from tidegate.kernels.linear.weights import TILE_ROWS, DenseWeight, GpuLinear, TiledLinear
from tidegate.model.architecture import Architecture
from tidegate.model.chat_template import ChatTemplate
from tidegate.model.packed import Array, DenseLinear, Linear, PackedLinear
from tidegate.model.registry import architecture_module, describe
from tidegate.model.roles import roles

_GROUP = 128
_DEVIATION = 0.02

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": _QWEN3
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
"""From the `config.json` that each model is published with; `tiny` tries the code."""


def architecture(name: str) -> Architecture:
    """The architecture of one of `CONFIGS`."""
    arch = describe(CONFIGS[name])
    assert isinstance(arch, Architecture)
    return arch


class NoWeights:
    """`tidegate.model.walk.Weights` of random numbers; see the module."""

    def __init__(self, arch: Architecture, *, bits: int = 16) -> None:
        """Dense at 16 bits; at 4, all linear layers but the table are packed in groups of 128."""
        self._roles, self._bits = roles(arch), bits
        rng = np.random.default_rng(0)
        widest = max(max(role.shape) for role in self._roles.values())
        self._floats = (rng.standard_normal(2 * widest) * _DEVIATION).astype(np.float32)
        self._bytes = rng.integers(0, 256, 2 * widest, np.uint8)

    def linear(self, role: str) -> Linear:
        """See `Weights`."""
        outputs, inputs = self._roles[role].shape
        if self._bits == 16 or role in ("embed", "head"):
            return DenseLinear(weight=_window(self._floats, outputs, inputs))
        group = min(_GROUP, inputs)
        groups = inputs // group
        packed = _window(self._bytes, outputs, inputs // 2)
        return PackedLinear(
            values=packed.reshape(outputs, groups, group // 2),
            scales=np.full((outputs, groups), _DEVIATION / 4, np.float16).astype(np.float32),
            zeros=np.full((outputs, groups), 8, np.uint8),
            inputs=inputs,
            bits=4,
            group_size=group,
        )

    def made(
        self, names: Sequence[str], *, dtype: torch.dtype, device: torch.device | str
    ) -> GpuLinear | None:
        """See `MadeOnDevice`: drawn there, the same for the same roles."""
        if ".experts." in names[0] or names[0].endswith(".router"):
            return None
        shapes = [self._roles[name].shape for name in names]
        outputs, inputs = sum(shape[0] for shape in shapes), int(shapes[0][1])
        draw = torch.Generator(device).manual_seed(len(names[0]) + outputs + inputs)
        if self._bits == 16 or names[0] in ("embed", "head") or inputs % _GROUP:
            shape = (outputs, inputs)
            weight = torch.randn(shape, generator=draw, dtype=dtype, device=device)
            return DenseWeight(weight=weight.mul_(_DEVIATION))
        tiles, steps = -(-outputs // TILE_ROWS), inputs // _GROUP
        shape = (tiles, steps, TILE_ROWS * _GROUP // 2)
        stored = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=draw)
        sides = torch.empty(2, tiles, steps, TILE_ROWS, dtype=torch.float16, device=device)
        sides[0], sides[1] = _DEVIATION / 4, 8
        return TiledLinear(
            values=stored.view(torch.int32),
            scales=sides[0].view(torch.int32),
            zeros=sides[1].view(torch.int32),
            bias=None,
            inputs=inputs,
            outputs=outputs,
            bits=4,
            step=_GROUP,
        )

    def vector(self, role: str) -> Array:
        """See `Weights`."""
        return np.ones(self._roles[role].shape, np.float32)


def _window(run: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[Any]:
    """[rows, columns] of which each row begins one number behind the last; no copy."""
    return as_strided(run, (rows, columns), (run.itemsize, run.itemsize))


def text_model(vocab: int, context_tokens: int) -> TextModel:
    """Bytes, and a word for every other token; nothing ends an answer."""
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")
    return TextModel(
        _tokenizer(vocab), eos_ids=frozenset(), context_tokens=context_tokens, template=template
    )


def _tokenizer(vocab: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}w{n}" for n in range(vocab))]
    made = Tokenizer(models.BPE(vocab={one: n for n, one in enumerate(tokens[:vocab])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def write_checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint in bfloat16, a file per layer, as the Hub has them."""
    arch = architecture(name)
    index: dict[str, str] = {}
    for number, tensors in enumerate(_shards(arch)):
        file = f"model-{number:05}.safetensors"
        _write(folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    _tokenizer(arch.vocab).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


def _shards(arch: Architecture) -> Iterator[dict[str, npt.NDArray[np.uint16]]]:
    """Tensors by name, as the bits of bfloat16: signs at random, magnitudes of 0.008 to 0.016."""
    widest = max(max(role.shape) for role in roles(arch).values())
    run = np.random.default_rng(0).integers(0, 2**16, 2 * widest, np.uint16) & 0x807F | 0x3C00
    sources = architecture_module(arch.model_type).sources(arch, ())
    shard: dict[str, npt.NDArray[np.uint16]] = {}
    layer = ""
    for name, role in roles(arch).items():
        if name.rpartition(".")[0] != layer and shard:
            yield shard
            shard = {}
        layer = name.rpartition(".")[0]
        plain = role.shape if len(role.shape) == 2 else (1, *role.shape)
        shard[sources[name].tensor] = _window(run, *plain).reshape(role.shape)
    yield shard


def _write(path: Path, tensors: dict[str, npt.NDArray[np.uint16]]) -> None:
    header, at = {}, 0
    for name, one in tensors.items():
        header[name] = {"dtype": "BF16", "shape": one.shape, "data_offsets": [at, at + one.nbytes]}
        at += one.nbytes
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for one in tensors.values():
            np.ascontiguousarray(one).tofile(file)
