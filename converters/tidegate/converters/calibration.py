"""Calibration text: a file of prose or chats, as token sequences of the model it is to show.

A file that ends in `.jsonl` holds one chat (`{"messages": [...]}`, rendered with the model's own
template) or text (`{"text": ...}`) a line; any other is one text. Texts are cut into sequences
that each begin and end as the tokenizer begins and ends a text; of too many, some are taken at
even distances.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from tidegate.converters.passes.base import CalibrationText
from tidegate.errors import BundleError, ConversionError, RequestError
from tidegate.model.chat_template import ChatTemplate
from tidegate.model.checkpoint import read_json_object
from tidegate.model.registry import AnyArchitecture

SEQUENCES, SEQUENCE_TOKENS = 128, 256
"""Quantisers gain little from more; activations of 32 768 tokens fit a small machine's disk."""

TRAINING_SEQUENCES = 1 << 16
"""16.8 million tokens, kept in memory: more than a small machine trains on in a day."""

MOST_ACTIVATION_BYTES = 1 << 30
"""What the activations between two blocks may take on the disk; wide models get fewer tokens."""

_DEFAULT = "calibration.txt"
_FEWEST_TOKENS = 2
_MOST_TEMPLATE_CHARS = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoder:
    """Texts to tokens."""

    tokenizer: Tokenizer
    before: tuple[int, ...]
    """What the tokenizer puts before a text, such as a begin token."""
    after: tuple[int, ...]
    tokens: int
    """Of a sequence, at most."""

    def plain(self, text: str) -> Iterator[tuple[int, ...]]:
        """A text, with the tokenizer's own tokens around each piece."""
        room = self.tokens - len(self.before) - len(self.after)
        for piece in _pieces(self._ids(text), room):
            yield (*self.before, *piece, *self.after)

    def rendered(self, text: str) -> Iterator[tuple[int, ...]]:
        """A chat, whose template has put in every special token."""
        return _pieces(self._ids(text), self.tokens)

    def _ids(self, text: str) -> Sequence[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def read_calibration_text(
    files: Path,
    arch: AnyArchitecture,
    path: Path | None,
    *,
    sequences: int = SEQUENCES,
    sequence_tokens: int = SEQUENCE_TOKENS,
) -> CalibrationText:
    """Read calibration text and cut it into sequences.

    Args:
        files: a folder as `tidegate.model.text_files` writes it.
        arch: the model, for its context and width.
        path: the text; what comes with the package when None.
        sequences: at most so many.
        sequence_tokens: at most so many each.

    Raises:
        ConversionError: the file cannot be read, or holds no text for this model.
    """
    name = _DEFAULT if path is None else path.name
    data = _read(path)
    encoder = _encoder(files, min(sequence_tokens, arch.context))
    found = list(_sequences(data, name, encoder, files))
    if not found:
        raise ConversionError(f"{name}: holds no text that the tokenizer gives tokens for")
    fitting = max(MOST_ACTIVATION_BYTES // (arch.width * 4 * sequence_tokens), 1)
    return CalibrationText(
        name=name,
        sha256=hashlib.sha256(data).hexdigest(),
        sequences=tuple(_spread(found, min(sequences, fitting))),
        all_sequences=tuple(_spread(found, TRAINING_SEQUENCES)),
    )


def _read(path: Path | None) -> bytes:
    if path is None:
        return resources.files("tidegate.converters").joinpath(_DEFAULT).read_bytes()
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error


def _encoder(files: Path, tokens: int) -> _Encoder:
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    probe = "a"
    inner = list(tokenizer.encode(probe, add_special_tokens=False).ids)
    whole = list(tokenizer.encode(probe, add_special_tokens=True).ids)
    starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner]
    start = starts[0] if inner and starts else 0
    end = start + len(inner) if inner and starts else len(whole)
    return _Encoder(
        tokenizer=tokenizer,
        before=tuple(whole[:start]),
        after=tuple(whole[end:]),
        tokens=tokens,
    )


def _sequences(data: bytes, name: str, encoder: _Encoder, files: Path) -> Iterator[tuple[int, ...]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConversionError(f"{name}: is not UTF-8 text") from error
    if not name.endswith(".jsonl"):
        yield from encoder.plain(text)
        return
    template: ChatTemplate | None = None
    tokens = _named_tokens(encoder.tokenizer, files)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        body = _line(line, where)
        if isinstance(body, str):
            yield from encoder.plain(body)
            continue
        template = template or _template(files, where)
        yield from encoder.rendered(_render(template, body, tokens, where))


def _line(line: str, where: str) -> str | list[object]:
    """The text of a line, or its messages."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{where}: is not JSON") from error
    keys = set(body) if isinstance(body, dict) else set[str]()
    if keys == {"text"} and isinstance(body["text"], str):
        return str(body["text"])
    messages = body["messages"] if "messages" in keys else None
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        return list(messages)
    raise ConversionError(f'{where}: must be {{"messages": [...]}} or {{"text": "..."}}')


def _template(files: Path, where: str) -> ChatTemplate:
    path = files / "chat_template.jinja"
    if not path.is_file():
        raise ConversionError(f"{where}: holds a chat, and the checkpoint has no chat template")
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"))
    except BundleError as error:
        raise ConversionError(str(error)) from error


def _render(
    template: ChatTemplate, messages: list[object], tokens: Mapping[str, str], where: str
) -> str:
    given = {**tokens, "messages": messages, "add_generation_prompt": False}
    try:
        return template.render(given, most_chars=_MOST_TEMPLATE_CHARS)
    except RequestError as error:
        raise ConversionError(f"{where}: {error}") from error


def _named_tokens(tokenizer: Tokenizer, files: Path) -> dict[str, str]:
    """The special tokens that templates ask for by name."""
    ids = read_json_object(files / "generation_config.json")
    return {
        f"{kind}_token": _token(tokenizer, ids.get(f"{kind}_token_id")) for kind in ("bos", "eos")
    }


def _token(tokenizer: Tokenizer, ids: object) -> str:
    first = ids[0] if isinstance(ids, list) and ids else ids
    return (tokenizer.id_to_token(first) or "") if isinstance(first, int) else ""


def _pieces(ids: Sequence[int], room: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(ids), max(room, 1)):
        piece = tuple(ids[start : start + max(room, 1)])
        if len(piece) >= _FEWEST_TOKENS:
            yield piece


def _spread(found: Sequence[tuple[int, ...]], most: int) -> Iterator[tuple[int, ...]]:
    """At most `most` of them, at even distances."""
    count = min(len(found), most)
    for number in range(count):
        yield found[number * len(found) // count]
