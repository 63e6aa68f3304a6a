"""A byte-level tokenizer trained in milliseconds, and a chat template, for tests of the engine.

Ids: 0 ends an answer, 1 and 2 open a turn; then the 256 bytes and a few merges. Below 300 in all.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tidegate.engine.text import TextModel
from tidegate.model.chat_template import ChatTemplate

EOS = 0
VOCAB = 300
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ("user", "assistant") %}{{ raise_exception("no role " ~ message.role) }}
{%- endif %}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""

_CORPUS = ["hello world, the tide is at the gate and the quick brown fox is not"] * 4


@cache
def tokenizer_json() -> str:
    """What a bundle's `tokenizer.json` holds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str())


def toy_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json())


@cache
def toy_template() -> ChatTemplate:
    """Compiled once: it keeps no state, and compiling it costs more than most tests do."""
    return ChatTemplate(TEMPLATE)


def toy_text(*, context_tokens: int = 128, eos: bool = True) -> TextModel:
    """The text side of a toy model."""
    return TextModel(
        toy_tokenizer(),
        eos_ids=frozenset({EOS}) if eos else frozenset(),
        context_tokens=context_tokens,
        template=toy_template(),
    )
