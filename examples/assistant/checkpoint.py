"""Checkpoints in Hugging Face layout: what `train.py` writes and `evaluate.py` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .corpus import SMALL_TALK, training_conversation
from .model import Llama, Shape
from .tokenizer import CHAT_TEMPLATE, END, END_ID, PAD, PAD_ID, SPECIAL_TOKENS, train_tokenizer

TOKENIZER_CONVERSATIONS: Final = 4000


def load_or_train_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer at a path, training it on the first conversations if there is none."""
    if not path.exists():
        conversations = (
            training_conversation(seed, tier_weights=(1, 1, 1, 1))
            for seed in range(TOKENIZER_CONVERSATIONS)
        )
        texts = [message["content"] for c in conversations for message in c.messages()]
        texts += [text for pair in SMALL_TALK for text in pair] * 20
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts).save(str(path))
    return Tokenizer.from_file(str(path))


def llama_config(shape: Shape) -> dict[str, object]:
    """Return the shape as a Hugging Face `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }


def shape_of(config: dict[str, object]) -> Shape:
    """Return the shape that a `config.json` written by `llama_config` describes."""
    integers = {key: value for key, value in config.items() if isinstance(value, int)}
    return Shape(
        width=integers["hidden_size"],
        layers=integers["num_hidden_layers"],
        heads=integers["num_attention_heads"],
        kv_heads=integers["num_key_value_heads"],
        inner=integers["intermediate_size"],
        context=integers["max_position_embeddings"],
        head_size=integers["head_dim"],
        vocabulary=integers["vocab_size"],
    )


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder: configuration, bfloat16 weights, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", llama_config(model.shape))
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
        "model_max_length": model.shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """Read a checkpoint folder back, as float32 for evaluation."""
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    model = Llama(shape)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
