"""Grow a small trained model into a larger one that computes the same function.

New widths start at zero where they would be read, new layers add nothing, a new kv head is a copy.
Training then goes on from what the small model knows (after Net2Net, Chen et al. 2016), which on a
CPU is several times cheaper than learning the same again in the large shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Llama, Shape


def check_growth(small: Shape, large: Shape) -> None:
    """Refuse shapes that this growth cannot connect.

    Raises:
        ValueError: a dimension shrinks, or the heads do not divide.
    """
    for name in ("width", "layers", "heads", "kv_heads", "inner"):
        if getattr(large, name) < getattr(small, name):
            raise ValueError(f"{name} = {getattr(large, name)}: must not shrink")
    if large.kv_heads % small.kv_heads or large.head_size != small.head_size:
        raise ValueError(f"kv_heads = {large.kv_heads}: must be a multiple of {small.kv_heads}")


def head_places(small: Shape, large: Shape) -> list[int]:
    """Return, for each query head of the small model, its place in the large one.

    The query heads of a kv head are dealt to the copies of that kv head.
    """
    copies = large.kv_heads // small.kv_heads
    small_group, large_group = small.heads // small.kv_heads, large.heads // large.kv_heads
    if small_group > copies * large_group:
        raise ValueError(f"heads = {large.heads}: too few for groups of {small_group}")
    return [
        (kv_head * copies) * large_group + place
        for kv_head in range(small.kv_heads)
        for place in range(small_group)
    ]


def rows_of_heads(heads: list[int], head_size: int) -> Tensor:
    """Return the row numbers that a list of heads occupies."""
    return torch.tensor([head * head_size + n for head in heads for n in range(head_size)])


def layer_places(small: Shape, large: Shape) -> list[int]:
    """Return, for each layer of the small model, its place in the large one, evenly spread."""
    return [n * large.layers // small.layers for n in range(small.layers)]


@torch.no_grad()
def grow(small: Llama, large: Llama) -> None:
    """Set a freshly initialised large model so that it computes what the small one does."""
    before, after = small.shape, large.shape
    check_growth(before, after)
    width, inner = before.width, before.inner
    source, target = dict(small.named_parameters()), dict(large.named_parameters())
    # A mean over more dimensions is smaller: the norm's weight makes up for it.
    scale = (width / after.width) ** 0.5
    queries = rows_of_heads(head_places(before, after), after.head_size)
    copies = after.kv_heads // before.kv_heads
    keys = rows_of_heads([head // copies for head in range(after.kv_heads)], after.head_size)
    target["model.embed_tokens.weight"].zero_()[:, :width] = source["model.embed_tokens.weight"]
    target["model.norm.weight"].fill_(scale)[:width] = source["model.norm.weight"] * scale
    for name in (n for n in target if n.endswith(("o_proj.weight", "down_proj.weight"))):
        target[name].zero_()
    for old, new in enumerate(layer_places(before, after)):
        a, b = f"model.layers.{old}.", f"model.layers.{new}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            target[b + norm].fill_(scale)[:width] = source[a + norm] * scale
        q, o = "self_attn.q_proj.weight", "self_attn.o_proj.weight"
        target[b + q][queries, :width] = source[a + q]
        target[b + o][:width, queries] = source[a + o]
        for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            target[b + name][:, :width] = source[a + name][keys]
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            target[b + name][:inner, :width] = source[a + name]
        target[b + "mlp.down_proj.weight"][:width, :inner] = source[a + "mlp.down_proj.weight"]
