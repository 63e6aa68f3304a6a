"""The text side of a checkpoint, brought into one shape: three files in a folder.

Checkpoints keep the chat template in a file of its own or inside `tokenizer_config.json`, and the
end tokens in `generation_config.json` or `config.json`. A bundle, and whoever reads a checkpoint
as if it were one, has one place for each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeGuard

from tidegate.errors import CheckpointError
from tidegate.model.checkpoint import Checkpoint, read_json_object
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.encoder_use import write_use
from tidegate.model.registry import AnyArchitecture

_IDS = ("bos_token_id", "eos_token_id")


def write_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `tokenizer.json`, `chat_template.jinja` and `generation_config.json` to `folder`.

    Of an encoder also what its config says of its outputs, see `tidegate.model.encoder_use`.

    Only the tokenizer must exist as a file; the others are found where older checkpoints keep
    them, and a model without a template gets none.

    Raises:
        CheckpointError: the tokenizer is missing or damaged, or has a token that the model has
            no embedding for.
    """
    tokenizer = read_json_object(checkpoint.folder / "tokenizer.json")
    _check_vocabulary(tokenizer, checkpoint.architecture)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        source = checkpoint.folder / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())
    if not (folder / "chat_template.jinja").exists():
        template = _template_of(checkpoint.folder / "tokenizer_config.json")
        if template is not None:
            (folder / "chat_template.jinja").write_bytes(template)
    if isinstance(checkpoint.architecture, EncoderArchitecture):
        write_use(checkpoint.config, checkpoint.architecture, folder)
    path = folder / "generation_config.json"
    settings = read_json_object(path) if path.exists() else {}
    missing = {
        key: checkpoint.config[key]
        for key in _IDS
        if settings.get(key) is None and key in checkpoint.config
    }
    path.write_text(json.dumps(settings | missing), encoding="utf-8")


def _check_vocabulary(tokenizer: dict[str, object], arch: AnyArchitecture) -> None:
    """A token that the embedding has no row for would read another's memory: refuse it here."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list):
        raise CheckpointError("tokenizer.json: has no model.vocab")
    added = tokenizer.get("added_tokens")
    listed = added if isinstance(added, list) else []
    found: list[object] = [token.get("id") for token in listed if isinstance(token, dict)]
    if isinstance(vocabulary, dict):
        found += vocabulary.values()
    highest = max([len(vocabulary) - 1, *(one for one in found if isinstance(one, int))])
    if highest >= arch.vocab:
        raise CheckpointError(
            f"tokenizer.json: token id {highest}: the embedding has {arch.vocab} rows"
        )


def _template_of(path: Path) -> bytes | None:
    """The template in `tokenizer_config.json`: a text, or a list of named ones with a default."""
    if not path.is_file():
        return None
    template = read_json_object(path).get("chat_template")
    if template is None:
        return None
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if _is_named(one)}
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path.name}: chat_template: must be a text, or a list with one named 'default'"
        )
    try:
        return template.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path.name}: chat_template: is no Unicode text") from error


def _is_named(template: object) -> TypeGuard[dict[str, object]]:
    return isinstance(template, dict) and isinstance(template.get("name"), str)
