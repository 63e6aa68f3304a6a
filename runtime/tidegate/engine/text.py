"""`TextModel`: a bundle's text side, prompts to tokens and the ids that end an answer.

Special tokens written in a message are text, not control: a user who types `<|im_end|>` does not
end their turn. Their characters are marked before the template runs and encoded one by one after
it, so every other prompt is tokenised exactly as its model's authors do. Raw prompts
(`encode_prompt`) are the caller's own and keep their special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from tidegate.engine.detokenise import Detokeniser
from tidegate.engine.token_bytes import TokenBytes
from tidegate.errors import BundleError, RequestError
from tidegate.model.chat_template import ChatTemplate

_CHARS_PER_TOKEN: Final = 16
"""No text in use comes near: English has 4 to 5, source code 3, a run of blanks at most 8 or so."""
_NONCHARACTERS: Final = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Unicode keeps these for internal use; one that the messages lack marks broken special tokens."""


class TextModel:
    """Tokenizer, chat template and end-of-answer ids of one model. Safe to use from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_ids: frozenset[int],
        context_tokens: int,
        template: ChatTemplate | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        max_prompt_chars: int | None = None,
    ) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: owned by this object from now on.
            eos_ids: tokens that end an answer.
            context_tokens: the most tokens a prompt may have, less one for the answer.
            template: None for a model without chat.
            bos_id: for templates that write `bos_token`.
            eos_id: for templates that write `eos_token`; the first that the model's authors list.
            max_prompt_chars: longer prompts are refused before anything reads them; None: 16 per
                token of the context.
        """
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        self.context_tokens = context_tokens
        self.max_prompt_chars = max_prompt_chars or _CHARS_PER_TOKEN * context_tokens
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer)
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self.plain_marks = {
            token.content: number
            for number, token in added.items()
            if not token.special and token.content.startswith("<") and token.content.endswith(">")
        }
        """Added tokens that look like control and show in an answer's text, and their ids."""
        self.marks = self.plain_marks | {
            token.content: number for number, token in added.items() if token.special
        }
        """Tokens that a grammar can name and no text can spell."""
        special = sorted(
            (token.content for token in added.values() if token.special), key=len, reverse=True
        )
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._variables = {
            "bos_token": "" if bos_id is None else tokenizer.id_to_token(bos_id) or "",
            "eos_token": "" if eos_id is None else tokenizer.id_to_token(eos_id) or "",
        }

    @classmethod
    def load(
        cls, directory: Path, *, context_tokens: int, max_prompt_chars: int | None = None
    ) -> TextModel:
        """Read `tokenizer.json`, `chat_template.jinja` and `generation_config.json`.

        The last two may be missing: then there is no chat, or only `max_tokens` ends an answer.

        Raises:
            BundleError: a file is missing or damaged; the message names it.
        """
        bos_id, eos_ids = _generation_ids(directory / "generation_config.json")
        template = directory / "chat_template.jinja"
        return cls(
            _tokenizer(directory / "tokenizer.json"),
            eos_ids=frozenset(eos_ids),
            bos_id=bos_id,
            eos_id=eos_ids[0] if eos_ids else None,
            context_tokens=context_tokens,
            template=ChatTemplate(_read(template)) if template.exists() else None,
            max_prompt_chars=max_prompt_chars,
        )

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    @property
    def template_source(self) -> str:
        """The chat template as it was written; empty without one."""
        return "" if self._template is None else self._template.source

    @property
    def knows_tools(self) -> bool:
        """The chat template says what can be called, and what was."""
        return self._template is not None and "tools" in self._template.variables

    def tokenizer_json(self) -> str:
        """The tokenizer as its file holds it, for a library that reads its own."""
        return str(self._tokenizer.to_str())

    def detokeniser(self, *, visible: frozenset[int] = frozenset()) -> Detokeniser:
        """A fresh one, for one answer; `visible` are special tokens that are text in it."""
        return Detokeniser(self._tokenizer, self._token_bytes, visible=visible)

    def decode(self, tokens: Sequence[int]) -> str:
        """The whole text of `tokens`, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones as they are written.

        Raises:
            RequestError: the model has no such token; the message names the first.
        """
        self.names_of(tokens)
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def names_of(self, tokens: Sequence[int]) -> list[str]:
        """How the vocabulary spells each token, such as `Ġhello`.

        Raises:
            RequestError: the model has no such token; the message names the first.
        """
        names: list[str] = []
        for index, token in enumerate(tokens):
            name = self._tokenizer.id_to_token(token) if 0 <= token < 1 << 32 else None
            if name is None:
                raise RequestError(
                    f"tokens[{index}]", f"{token}: must be one of the model's tokens"
                )
            names.append(name)
        return names

    def tokens_of(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The tokens of any text, however many; `special`: with those that the tokenizer adds.

        Raises:
            RequestError: it is longer than the limit it names (413).
        """
        self._check_chars("prompt", len(text))
        return tuple(self._encode(text, add_special_tokens=special))

    def encode_prompt(self, prompt: str, *, limited: bool = True) -> tuple[int, ...]:
        """A raw prompt's tokens, with those that the tokenizer itself adds.

        Args:
            prompt: of at most `max_prompt_chars` characters.
            limited: refuse more tokens than the context; otherwise the caller cuts them.

        Raises:
            RequestError: it is empty (400), or longer than the limit it names (413).
        """
        self._check_chars("prompt", len(prompt))
        tokens = self._encode(prompt, add_special_tokens=True)
        return self._checked("prompt", tokens) if limited or not tokens else tuple(tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        limited: bool = True,
        **variables: object,
    ) -> tuple[int, ...]:
        """The tokens of a conversation, ready for the assistant's next turn.

        Args:
            messages: as in the OpenAI API: `role`, `content` and what the template knows beyond.
            limited: refuse more tokens than the context.
            variables: further template variables, such as `tools` or `enable_thinking`.

        Raises:
            RequestError: there is no template, it refuses the messages (400), or they are longer
                than the limit it names (413).
        """
        if self._template is None:
            raise RequestError("messages", "this model has no chat template: use completions")
        given = {"messages": messages, **variables}
        self._check_chars("messages", _chars(given))
        mark = next((one for one in _NONCHARACTERS if not _contains(given, one)), None)
        if mark is None:
            raise RequestError("messages", "use every Unicode noncharacter: must leave one")
        text = self._template.render(
            {**self._variables, **{key: self._broken(one, mark) for key, one in given.items()}},
            most_chars=2 * self.max_prompt_chars,
        )
        parts = (self._encode(part, add_special_tokens=False) for part in text.split(mark))
        tokens = [token for part in parts for token in part]
        return self._checked("messages", tokens) if limited or not tokens else tuple(tokens)

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that an answer begins with; special tokens in it are just text.

        Raises:
            RequestError: it is longer than the limit it names (413).
        """
        self._check_chars("messages", len(text))
        mark = next((one for one in _NONCHARACTERS if one not in text), None)
        if mark is None:
            raise RequestError("messages", "use every Unicode noncharacter: must leave one")
        parts = str(self._broken(text, mark)).split(mark)
        return tuple(
            token for part in parts for token in self._encode(part, add_special_tokens=False)
        )

    def _broken(self, value: object, mark: str) -> object:
        """`value` with a mark around every character of the special tokens in its texts."""
        if isinstance(value, str):
            return self._special.sub(lambda found: mark.join(("", *found[0], "")), value)
        if isinstance(value, Mapping):
            items = value.items()
            return {self._broken(key, mark): self._broken(inner, mark) for key, inner in items}
        if isinstance(value, Sequence):
            return [self._broken(inner, mark) for inner in value]
        return value

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _check_chars(self, name: str, chars: int) -> None:
        if chars > self.max_prompt_chars:
            raise RequestError(
                name,
                f"{chars} characters: must be at most {self.max_prompt_chars}"
                f" (the context is {self.context_tokens} tokens)",
                status=413,
            )

    def _checked(self, name: str, tokens: list[int]) -> tuple[int, ...]:
        if not tokens:
            raise RequestError(name, "is empty: must give at least one token")
        if len(tokens) >= self.context_tokens:
            raise RequestError(
                name,
                f"{len(tokens)} tokens: must be less than the context of {self.context_tokens}",
                status=413,
            )
        return tuple(tokens)


def _chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_chars(key) + _chars(inner) for key, inner in value.items())
    return sum(map(_chars, value)) if isinstance(value, Sequence) else 0


def _contains(value: object, mark: str) -> bool:
    if isinstance(value, str):
        return mark in value
    if isinstance(value, Mapping):
        return any(_contains(one, mark) for item in value.items() for one in item)
    return isinstance(value, Sequence) and any(_contains(one, mark) for one in value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path.name}: {error}") from error


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(_read(path))
    except BundleError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"{path.name}: not a tokenizer: {error}") from error
    # What training cut or filled up to one length is a whole prompt here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _generation_ids(path: Path) -> tuple[int | None, list[int]]:
    """BOS and EOS ids; EOS may be one id or a list."""
    if not path.exists():
        return None, []
    try:
        config = json.loads(_read(path))
        eos = config.get("eos_token_id")
        bos = config.get("bos_token_id")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{path.name}: not a JSON object: {error}") from error
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(one, int) for one in [*ids, 0 if bos is None else bos]):
        raise BundleError(f"{path.name}: eos_token_id and bos_token_id must be token ids")
    return bos, ids
