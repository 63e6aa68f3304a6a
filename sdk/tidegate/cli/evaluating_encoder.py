"""Measures an encoder's bundle against its checkpoint: the angle between their embeddings.

The text holds one sentence per line, or JSON lines with `"text"`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tidegate.cli.evaluating import EvaluationSettings, text_model
from tidegate.converters.evaluation.measures import cosine
from tidegate.converters.evaluation.reference import reference_embeddings
from tidegate.converters.passes.base import Progress
from tidegate.edge.executors.choice import choose_target
from tidegate.edge.executors.encoder import EncoderSettings, open_encoder
from tidegate.errors import ConfigError, RequestError
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.quality import EmbeddingQuality


def evaluate_encoder(
    bundle: Bundle,
    checkpoint: Checkpoint,
    text_file: Path,
    settings: EvaluationSettings,
    progress: Progress,
) -> EmbeddingQuality:
    """Measure an encoder's bundle.

    Raises:
        ConfigError: the text cannot be read, or a line is longer than the context; names the line.
    """
    arch = checkpoint.architecture
    if not isinstance(arch, EncoderArchitecture):
        raise ConfigError("reference", arch.model_type, "an encoder, as the bundle is")
    raw, texts = _read(text_file, bundle, settings)
    progress("measure", 0, 2)
    expected = reference_embeddings(arch, checkpoint.weights(), texts)
    progress("measure", 1, 2)
    executor = open_encoder(bundle, EncoderSettings(choice=settings.executor, exact=settings.exact))
    try:
        similar = cosine(expected, executor.encode(texts))
    finally:
        executor.close()
    progress("measure", 2, 2)
    return EmbeddingQuality(
        text=text_file.name,
        text_sha256=hashlib.sha256(raw).hexdigest(),
        sentences=len(texts),
        backend=choose_target(bundle, settings.executor),
        reference="checkpoint in float32",
        cosine_mean=float(similar.mean()),
        cosine_min=float(similar.min()),
    )


def _read(
    path: Path, bundle: Bundle, settings: EvaluationSettings
) -> tuple[bytes, list[tuple[int, ...]]]:
    """The file's bytes, and the tokens of every line until `settings.tokens` are read."""
    try:
        raw = path.read_bytes()
        lines = raw.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", str(path), f"a readable UTF-8 file ({error})") from error
    model, texts = text_model(bundle), list[tuple[int, ...]]()
    context = bundle.manifest.context_tokens
    for number, line in enumerate(lines, start=1):
        if not line.strip() or sum(map(len, texts)) >= settings.tokens:
            continue
        where = f"{path.name}, line {number}"
        try:
            text = json.loads(line)["text"] if path.suffix == ".jsonl" else line
            tokens = model.encode_prompt(text)
        except (ValueError, KeyError, TypeError, RecursionError, RequestError) as error:
            raise ConfigError("text", where, 'a sentence, or {"text": ...} in .jsonl') from error
        if len(tokens) > context:
            raise ConfigError("text", where, f"at most {context} tokens and not {len(tokens)}")
        texts.append(tokens)
    if not texts:
        raise ConfigError("text", str(path), "a text of one sentence or more")
    return raw, texts
