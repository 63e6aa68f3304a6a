"""What most decoder modules share: the sizes of a config, and the tensor names of Llama.

Nearly every decoder on the Hub spells its config and its tensors as Llama does and adds a
difference or two. Its module takes `base`, replaces what differs, and lists its tensors with
`names`; nothing here knows of a particular model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Activation, Architecture, LayerKind
from tidegate.model.config import (
    Config,
    flag,
    optional_int,
    positive_float,
    positive_int,
    text,
    whole_number,
)
from tidegate.model.registry import Source
from tidegate.model.rope import Rope, longest_context, read_rope

NORMS_BEFORE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
ATTENTION = {role: f"self_attn.{role}_proj" for role in "qkvo"}
MLP = {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
QK_NORMS = {f"{role}_norm": f"self_attn.{role}_norm" for role in "qk"}

LAYER_TYPES = ("full_attention", "sliding_attention")
"""What `layer_types` may say of a layer: it sees all tokens, or those in `sliding_window`."""

# Far above any model (126 layers, heads of 512 at most so far), far below what fills a memory.
_MOST_LAYERS, _MOST_HEAD_SIZE = 4096, 4096

_ACTIVATIONS: dict[object, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def base(
    config: Config, context: int | None = None, *, partial_rotation: bool = False
) -> Architecture:
    """A decoder as Llama is one; modules `dataclasses.replace` what differs.

    What a model's own library takes a missing key for differs between models, so a module passes
    `{**_DEFAULTS, **config}` where it is not what is taken here.

    Args:
        config: the parsed `config.json`.
        context: positions to serve, None for what the model was trained for.
        partial_rotation: the model can leave a part of each head unrotated.

    Raises:
        CheckpointError: a key is missing, of the wrong type, or does not fit another; or `context`
            is more than the model can be served with.
    """
    width, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads = {kv_heads}: "
            f"must divide num_attention_heads = {heads}"
        )
    head_size = head_dim(config, width, heads)
    bias = flag(config, "attention_bias", False)
    return Architecture(
        model_type=text(config, "model_type", "llama"),
        layers=positive_int(config, "num_hidden_layers", most=_MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        inner=positive_int(config, "intermediate_size"),
        vocab=positive_int(config, "vocab_size"),
        context=served_context(config, context),
        norm_eps=positive_float(config, "rms_norm_eps", 1e-6),
        activation=activation(config, "hidden_act", "silu"),
        kinds=(LayerKind(rope=rope(config, head_size, context, partial=partial_rotation)),),
        tied_head=flag(config, "tie_word_embeddings", False),
        attention_scale=head_size**-0.5,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(config, "mlp_bias", False),
    )


def head_dim(config: Config, width: int, heads: int) -> int:
    """Values of an attention head."""
    return positive_int(config, "head_dim", max(width // heads, 1), most=_MOST_HEAD_SIZE)


def activation(config: Config, key: str, default: str) -> Activation:
    """The non-linearity that `key` names."""
    name = text(config, key, default)
    if name not in _ACTIVATIONS:
        allowed = ", ".join(str(known) for known in _ACTIVATIONS)
        raise CheckpointError(f"config.json: {key} = {name!r}: must be one of {allowed}")
    return _ACTIVATIONS[name]


def served_context(config: Config, context: int | None) -> int:
    """The context to serve: the wanted one, or what the model was trained for."""
    trained = positive_int(config, "max_position_embeddings", 2048)
    longest = longest_context(config, trained)
    if context is not None and not 1 <= context <= longest:
        raise CheckpointError(f"context = {context}: must be from 1 to the model's {longest}")
    return context or trained


def rope(
    config: Config,
    head_size: int,
    context: int | None = None,
    kind: str | None = None,
    *,
    partial: bool = False,
) -> Rope:
    """The rotation of layers of type `kind` (a key of `rope_parameters`), or of all of them.

    `partial` says that the model can leave a part of each head unrotated.
    """
    return read_rope(
        config,
        head_size=head_size,
        trained_context=positive_int(config, "max_position_embeddings", 2048),
        context=served_context(config, context),
        kind=kind,
        partial=partial,
    )


def layer_types(config: Config, layers: int, default: Sequence[str]) -> Sequence[str]:
    """The config's `layer_types`, one of `LAYER_TYPES` for every layer; `default` without."""
    found = config.get("layer_types")
    if found is None:
        return default
    known = isinstance(found, list) and all(item in LAYER_TYPES for item in found)
    if not isinstance(found, list) or not known or len(found) != layers:
        raise CheckpointError(
            f"config.json: layer_types = {found!r:.80}: must be {layers} of {LAYER_TYPES}"
        )
    return found


def windows(types: Sequence[str], window: int | None) -> list[int | None]:
    """The window of every layer: `window` for those of type `sliding_attention`.

    A window of the Hub counts the token itself, as `AttentionSpec.window` does.
    """
    if window is None and "sliding_attention" in types:
        raise CheckpointError(
            "config.json: sliding_window is null or not in use: layer_types asks for one"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def upper_windows(config: Config, layers: int) -> list[int | None]:
    """Windows as Qwen's configs have them: none, or from layer `max_window_layers` on."""
    window = optional_int(config, "sliding_window")
    if not flag(config, "use_sliding_window", False):
        window = None
    first = whole_number(config, "max_window_layers", 28) if window is not None else layers
    types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return windows(layer_types(config, layers, types), window)


def with_kinds(arch: Architecture, kinds: Sequence[LayerKind]) -> Architecture:
    """`arch` with the kind of every layer; equal ones become one."""
    distinct = tuple(dict.fromkeys(kinds))
    pattern = tuple(distinct.index(kind) for kind in kinds) if len(distinct) > 1 else ()
    return replace(arch, kinds=distinct, pattern=pattern)


def with_windows(arch: Architecture, windows: Sequence[int | None]) -> Architecture:
    """`arch` with the window of every layer."""
    return with_kinds(
        arch, [replace(arch.kind(i), window=window) for i, window in enumerate(windows)]
    )


def names(
    arch: Architecture, parts: Mapping[str, str], present: Collection[str]
) -> dict[str, Source]:
    """Sources of embed, head and final norm, and of `parts` (role to tensor) in every layer.

    A bias is taken where the checkpoint has one.
    """
    found = {"embed": linear("model.embed_tokens", present), "final_norm": vector("model.norm")}
    if not arch.tied_head:
        found["head"] = linear("lm_head", present)
    for layer in range(arch.layers):
        for role, name in parts.items():
            full = f"model.layers.{layer}.{name}"
            source = vector(full) if role.endswith("norm") else linear(full, present)
            found[f"layers.{layer}.{role}"] = source
    return found


def linear(
    name: str,
    present: Collection[str],
    *,
    rows: tuple[int, int] | None = None,
    index: int | None = None,
) -> Source:
    """A linear layer `name`, with its bias if the checkpoint has one."""
    bias = f"{name}.bias"
    return Source(
        tensor=f"{name}.weight", rows=rows, index=index, bias=bias if bias in present else None
    )


def vector(name: str, *, plus: float = 0.0) -> Source:
    """A norm `name`."""
    return Source(tensor=f"{name}.weight", plus=plus)
