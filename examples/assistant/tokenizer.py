"""The tokenizer: byte-level BPE of 1024 tokens in which no token holds two digits.

Any text encodes, because the 256 bytes are in the vocabulary. Numbers are read digit by digit,
which is what lets a small model compare and add them; a space before a number joins its first
digit, so that a value directly follows what it belongs to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import Message

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS: Final = (PAD, END, SYSTEM, USER, ASSISTANT)
PAD_ID, END_ID = 0, 1
VOCABULARY: Final = 1024
COMMON_WORDS: Final = (
    " the of and to in is you that it he was for are as with his they at be this have from or one"
    " had by word but not what all were we when your can said there use an each which she do how"
    " their if will up other about out many then them these so some her would make like him into"
    " time has look more write go see number no way could people my than first water been call"
    " who its now find long down day did get come made may part over new sound take only little"
    " work know place year live me back give most very after thing our just name good sentence"
    " think say great where help through much before line right too mean old any same tell"
)
"""Words beside the corpus's own, so that other text does not fall apart into bytes."""
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Two statements of Jinja; `render` is the same in Python."""


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train the tokenizer on an iterable of texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(texts, [COMMON_WORDS] * 50), trainer)
    return tokenizer


def render(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Render messages exactly as `CHAT_TEMPLATE` does."""
    turns = (f"<|{message['role']}|>{message['content']}{END}" for message in messages)
    return "".join(turns) + (ASSISTANT if add_generation_prompt else "")


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Return token ids and, for each, whether the assistant wrote it (and training learns it)."""
    pieces, learned = [], []
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces += [f"<|{message['role']}|>", f"{message['content']}{END}"]
        learned += [False, is_answer]
    ids: list[int] = []
    mask: list[bool] = []
    for encoding, flag in zip(
        tokenizer.encode_batch_fast(pieces, add_special_tokens=False), learned, strict=True
    ):
        ids += encoding.ids
        mask += [flag] * len(encoding.ids)
    return ids, mask
