"""LoRA adapters in PEFT's layout for the tiny model, and checkpoints with one merged, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tidegate.model.safetensors_writer import write_safetensors

PREFIX = "base_model.model.model.layers."
CONFIG: dict[str, object] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 16,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def write_adapter(folder: Path, *, seed: int, rank: int = 4, scale: float = 0.08) -> Path:
    """An adapter for two layers of `tinymodel.tiny_architecture`."""
    rng = np.random.default_rng(seed)
    shapes = {
        "0.self_attn.q_proj": (128, 128),
        "1.self_attn.v_proj": (64, 128),
        "1.mlp.down_proj": (128, 192),
    }
    tensors = {}
    for path, (outputs, inputs) in shapes.items():
        for name, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            values = (scale * rng.standard_normal(shape)).astype(np.float32)
            tensors[f"{PREFIX}{path}.{name}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": rank}))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
