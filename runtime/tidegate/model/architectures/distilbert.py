"""DistilBERT: BERT with half the layers, no token types and its own names for everything.

Its classifier reads the first token through a linear layer and a ReLU (Sanh et al. 2019,
arXiv:1910.01108).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tidegate.model import bert_like, llama_like
from tidegate.model.config import Config, positive_int, refuse_unless
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.registry import Source

_NORM_EPS = 1e-12
"""Fixed in the model; no key of the config changes it."""

_NAMES = bert_like.EncoderNames(
    prefix="distilbert.",
    once={
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    },
    layer="transformer.layer",
    parts={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
)


def describe(config: Config, context: int | None = None) -> EncoderArchitecture:
    """Read a DistilBERT config; see `tidegate.model.registry.describe`.

    `sinusoidal_pos_embds` only says how training started: the table is in the checkpoint.
    """
    refuse_unless(config, "pruned_heads", ({},), "empty")
    labels = bert_like.read_labels(config, "DistilBert")
    pooling, normalised = bert_like.read_pooling(config, labels)
    arch = EncoderArchitecture(
        model_type="distilbert",
        layers=positive_int(config, "n_layers", 6, most=bert_like.MOST_LAYERS),
        width=positive_int(config, "dim", 768),
        heads=positive_int(config, "n_heads", 12),
        inner=positive_int(config, "hidden_dim", 3072),
        vocab=positive_int(config, "vocab_size"),
        context=bert_like.served_context(config, context),
        norm_eps=_NORM_EPS,
        activation=llama_like.activation(config, "activation", "gelu"),
        token_types=0,
        pooling=pooling,
        normalised=normalised,
        pooler="relu" if labels else "none",
        labels=labels,
    )
    return bert_like.check_heads(arch)


def sources(arch: EncoderArchitecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    heads = {"pooler": "pre_classifier", "classifier": "classifier"} if arch.labels else {}
    return bert_like.encoder_sources(arch, _NAMES, heads, present)
