"""A random checkpoint whose answers are words: most of its tokens are one distinct word each.

Encoding yields bytes and special tokens only, so every prompt is known; an answer reads like
` tide417 tide33`, which shows order and loss, and can be searched for on a wire.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from checkpoints import SPECIAL, byte_tokenizer, write_checkpoint
from tinymodel import RandomWeights, tiny_architecture

_BYTES = 256
_VOCAB = 1200


def write_word_checkpoint(
    folder: Path, *, layers: int = 2, context: int = 1024, seed: int = 0
) -> Path:
    """Write a checkpoint folder and return it; more layers make it slower."""
    arch = replace(tiny_architecture(layers=layers, context=context), vocab=_VOCAB)
    write_checkpoint(folder, arch, RandomWeights(arch, seed=seed))
    tokenizer = json.loads(byte_tokenizer(_BYTES + len(SPECIAL)).to_str())
    vocabulary = tokenizer["model"]["vocab"]
    # No merge makes them, so no prompt holds them; the decoder writes them as they are.
    for token in range(len(vocabulary), _VOCAB):
        vocabulary[f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}tide{token}"] = token
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
