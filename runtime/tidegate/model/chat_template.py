"""Chat templates: messages to prompt text, by Jinja2 in its immutable sandbox.

The environment is the one that model authors write for (`apply_chat_template` of Hugging Face
transformers): trimmed blocks, loop controls, a plain `tojson`, `raise_exception`, `strftime_now`
and the `generation` block. A template comes with a bundle and messages come from anyone: an error
in rendering is the request's, an error in compiling is the bundle's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tidegate.errors import BundleError, RequestError

_REASON_CHARS: Final = 300
"""Of a template's error message, which may quote the messages."""


class ChatTemplate:
    """A compiled template; `variables` is what it reads. `render` may be called anywhere."""

    def __init__(self, source: str, *, name: str = "chat_template.jinja") -> None:
        """Compile `source`.

        Raises:
            BundleError: it is not a valid template; the message names `name` and the line.
        """
        self.source = source
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self.variables = frozenset(find_undeclared_variables(environment.parse(source)))
        except TemplateError as error:
            line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
            raise BundleError(f"{name}{line}: {error.__class__.__name__}: {error}") from error

    def render(
        self,
        variables: Mapping[str, object],
        *,
        most_chars: int,
    ) -> str:
        """The prompt text, with the answer's beginning (`add_generation_prompt`) at its end.

        Args:
            variables: what the template reads: `messages`, `bos_token`, `tools`, ...
            most_chars: of the text.

        Raises:
            RequestError: the template refuses the messages, or its output passes `most_chars`.
        """
        context = {"add_generation_prompt": True, **variables}
        parts: list[str] = []
        chars = 0
        try:
            for part in self._template.generate(context):
                chars += len(part)
                if chars > most_chars:
                    raise RequestError(
                        "messages", f"give more than {most_chars} characters of prompt", status=413
                    )
                parts.append(part)
        except RequestError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            reason = str(error)[:_REASON_CHARS]
            raise RequestError("messages", f"the chat template refuses them: {reason}") from error
        return "".join(parts)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja2's own escapes HTML, which no model was trained on."""
    kept = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=False, indent=indent, **kept)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


_strftime_now: Callable[[str], str] = lambda layout: datetime.now().strftime(layout)  # noqa: E731
