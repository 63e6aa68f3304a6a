"""Calibration text: what becomes of prose and chats, and that a useless file is named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import CHAT_TEMPLATE, byte_tokenizer
from tinymodel import tiny_architecture
from tokenizers import processors

from tidegate.converters import calibration
from tidegate.converters.calibration import read_calibration_text
from tidegate.errors import ConversionError

ARCH = tiny_architecture()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    byte_tokenizer(ARCH.vocab).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def text_file(folder: Path, text: str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_text_is_cut_into_sequences_without_a_gap(files: Path, tmp_path: Path) -> None:
    prose = "abcdefghij" * 10
    found = read_calibration_text(files, ARCH, text_file(tmp_path, prose), sequence_tokens=32)
    assert [len(sequence) for sequence in found.sequences] == [32, 32, 32, 4]
    tokenizer = byte_tokenizer(ARCH.vocab)
    decoded = "".join(tokenizer.decode(list(one)) for one in found.sequences)
    assert decoded == prose
    assert found.name == "text.txt"
    assert found.sha256 == hashlib.sha256(prose.encode()).hexdigest()


def test_every_sequence_begins_and_ends_as_the_tokenizer_wants_it(
    files: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(ARCH.vocab)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", 2), ("<|end|>", 1)]
    )
    tokenizer.save(str(files / "tokenizer.json"))
    path = text_file(tmp_path, "abcdefghij" * 3)
    found = read_calibration_text(files, ARCH, path, sequence_tokens=12)
    assert [len(sequence) for sequence in found.sequences] == [12, 12, 12]
    assert {(sequence[0], sequence[-1]) for sequence in found.sequences} == {(2, 1)}


def test_of_too_much_text_sequences_from_all_over_it_are_taken(files: Path, tmp_path: Path) -> None:
    letters = "".join(letter * 8 for letter in "abcdefgh")
    found = read_calibration_text(
        files, ARCH, text_file(tmp_path, letters), sequences=4, sequence_tokens=8
    )
    tokenizer = byte_tokenizer(ARCH.vocab)
    assert [tokenizer.decode([one[0]]) for one in found.sequences] == ["a", "c", "e", "g"]
    assert [tokenizer.decode([one[0]]) for one in found.training] == list("abcdefgh")


def test_what_layers_give_for_it_never_outgrows_the_disk(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_ACTIVATION_BYTES", 3 * 8 * ARCH.width * 4)
    path = text_file(tmp_path, "x" * 200)
    found = read_calibration_text(files, ARCH, path, sequence_tokens=8)
    assert sum(map(len, found.sequences)) * ARCH.width * 4 <= calibration.MOST_ACTIVATION_BYTES
    assert len(found.sequences) == 3


def test_a_sequence_is_never_longer_than_the_model_can_read(files: Path, tmp_path: Path) -> None:
    arch = replace(ARCH, context=16)
    found = read_calibration_text(files, arch, text_file(tmp_path, "x" * 100))
    assert max(map(len, found.sequences)) == 16


def test_chats_are_rendered_with_the_models_template(files: Path, tmp_path: Path) -> None:
    chat = {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    lines = f"{json.dumps(chat)}\n\n{json.dumps({'text': 'plain'})}\n"
    found = read_calibration_text(files, ARCH, text_file(tmp_path, lines, "chats.jsonl"))
    tokenizer = byte_tokenizer(ARCH.vocab)
    texts = [tokenizer.decode(list(one), skip_special_tokens=False) for one in found.sequences]
    assert texts == ["<|user|>hello<|end|><|assistant|>yes<|end|>", "plain"]


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        ("", "empty.txt", "empty.txt: holds no text"),
        ('{"text": "ok"}\n{"text": ', "a.jsonl", "a.jsonl, line 2: is not JSON"),
        ('{"message": []}', "a.jsonl", "a.jsonl, line 1: must be"),
        ('{"messages": ["x"]}', "a.jsonl", "a.jsonl, line 1: must be"),
    ],
)
def test_a_file_without_use_is_named(
    files: Path, tmp_path: Path, text: str, name: str, named: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        read_calibration_text(files, ARCH, text_file(tmp_path, text, name))
    assert named in str(caught.value)


def test_chats_need_a_template_and_text_must_be_utf8(files: Path, tmp_path: Path) -> None:
    (files / "chat_template.jinja").unlink()
    chat = text_file(tmp_path, '{"messages": []}', "a.jsonl")
    with pytest.raises(ConversionError, match="has no chat template"):
        read_calibration_text(files, ARCH, chat)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ConversionError, match=r"latin\.txt: is not UTF-8"):
        read_calibration_text(files, ARCH, tmp_path / "latin.txt")
    with pytest.raises(ConversionError, match="cannot be read"):
        read_calibration_text(files, ARCH, tmp_path / "absent.txt")


def test_a_text_comes_along(files: Path) -> None:
    found = read_calibration_text(files, ARCH, None)
    assert found.name == "calibration.txt"
    assert sum(map(len, found.sequences)) > 10_000
