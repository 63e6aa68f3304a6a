"""BERT and everything saved as `model_type: bert` (MiniLM, BGE, GTE, E5, cross-encoders, ...).

Post-norm encoder with learned positions (Devlin et al. 2018, arXiv:1810.04805). Its classifier
reads the first token through a linear layer and a tanh. Texts are single ones: every token is of
type 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import bert_like, llama_like
from tidegate.model.config import Config, positive_float, positive_int, refuse_unless
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.registry import Source

_NAMES = bert_like.EncoderNames(
    prefix="bert.",
    once={
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    },
    layer="encoder.layer",
    parts={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
)


def describe(config: Config, context: int | None = None) -> EncoderArchitecture:
    """Read a BERT config; see `tidegate.model.registry.describe`."""
    refuse_unless(config, "position_embedding_type", ("absolute",), "'absolute'")
    for key in ("is_decoder", "add_cross_attention"):
        refuse_unless(config, key, (False,), "false: only encoders are known")
    refuse_unless(config, "pruned_heads", ({},), "empty")
    labels = bert_like.read_labels(config, "Bert")
    pooling, normalised = bert_like.read_pooling(config, labels)
    arch = EncoderArchitecture(
        model_type="bert",
        layers=positive_int(config, "num_hidden_layers", most=bert_like.MOST_LAYERS),
        width=positive_int(config, "hidden_size"),
        heads=positive_int(config, "num_attention_heads"),
        inner=positive_int(config, "intermediate_size"),
        vocab=positive_int(config, "vocab_size"),
        context=bert_like.served_context(config, context),
        norm_eps=positive_float(config, "layer_norm_eps", 1e-12),
        activation=llama_like.activation(config, "hidden_act", "gelu"),
        token_types=positive_int(config, "type_vocab_size", 2),
        pooling=pooling,
        normalised=normalised,
        pooler="tanh" if labels else "none",
        labels=labels,
    )
    return bert_like.check_heads(arch)


def sources(arch: EncoderArchitecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    if not arch.labels:
        return bert_like.encoder_sources(arch, _NAMES, {}, present)
    names = replace(_NAMES, once={**_NAMES.once, "pooler": "pooler.dense"})
    return bert_like.encoder_sources(arch, names, {"classifier": "classifier"}, present)
