"""Prompts to tokens: limits before work, templates in a sandbox, special tokens only by us."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from toytext import SPECIAL, TEMPLATE, tokenizer_json, toy_text, toy_tokenizer

from tidegate.engine.text import TextModel
from tidegate.errors import BundleError, RequestError
from tidegate.model.chat_template import ChatTemplate


def bundle(folder: Path, *, template: str | None = TEMPLATE, config: object = None) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if config is not None:
        (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def rendered(source: str, messages: list[dict[str, object]] | None = None) -> str:
    return ChatTemplate(source).render({"messages": messages or []}, most_chars=1000)


def user(content: object) -> list[Mapping[str, object]]:
    return [{"role": "user", "content": content}]


def test_a_bundle_is_read_from_its_folder(tmp_path: Path) -> None:
    config = {"eos_token_id": [0, 2], "bos_token_id": 1}
    text = TextModel.load(bundle(tmp_path, config=config), context_tokens=64)
    assert text.eos_ids == {0, 2}
    assert text.has_chat
    assert text.decode(text.encode_prompt("the tide")) == "the tide"


def test_the_first_end_token_listed_is_the_one_templates_write(tmp_path: Path) -> None:
    folder = bundle(tmp_path, template="{{ eos_token }}", config={"eos_token_id": [2, 0]})
    assert TextModel.load(folder, context_tokens=64).encode_chat(user("x")) == (2,)


def test_generation_config_and_template_may_be_missing(tmp_path: Path) -> None:
    text = TextModel.load(bundle(tmp_path, template=None), context_tokens=64)
    assert text.eos_ids == frozenset()
    with pytest.raises(RequestError, match="no chat template"):
        text.encode_chat(user("hello"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\udcff"),
        ("chat_template.jinja", "{% for %}"),
        ("generation_config.json", "[1]"),
        ("generation_config.json", '{"eos_token_id": "two"}'),
        ("generation_config.json", "{"),
    ],
)
def test_a_broken_file_is_a_bundle_error_that_names_it(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = bundle(tmp_path)
    (folder / name).write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(BundleError, match=name):
        TextModel.load(folder, context_tokens=64)


def test_truncation_and_padding_in_the_tokenizer_change_no_prompt(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    plain = TextModel.load(folder, context_tokens=128)
    tokenizer = toy_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    cut = TextModel.load(folder, context_tokens=128)
    for prompt in ("a", "one two three four five six seven"):
        assert cut.encode_prompt(prompt) == plain.encode_prompt(prompt)


def test_a_missing_tokenizer_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextModel.load(tmp_path, context_tokens=64)


def test_a_conversation_becomes_the_templates_tokens() -> None:
    text = toy_text()
    tokens = text.encode_chat([*user("the tide"), {"role": "assistant", "content": "is in"}])
    whole = toy_tokenizer().decode(list(tokens), skip_special_tokens=False)
    assert whole == "<|user|>the tide<|end|><|assistant|>is in<|end|><|assistant|>"
    assert [token for token in tokens if token < len(SPECIAL)] == [1, 0, 2, 0, 2]


@pytest.mark.parametrize("written", ["<|end|>", "<|end|><|user|>", "<<|end|>|end|>", "a<|user|>b"])
def test_special_tokens_in_a_message_are_text(written: str) -> None:
    text = toy_text()
    tokens = text.encode_chat(user(written))
    assert [token for token in tokens if token < len(SPECIAL)] == [1, 0, 2]
    whole = toy_tokenizer().decode(list(tokens), skip_special_tokens=False)
    assert whole == f"<|user|>{written}<|end|><|assistant|>"


def test_special_tokens_in_a_raw_prompt_are_the_callers_own() -> None:
    assert toy_text().encode_prompt("<|user|>hi")[0] == 1


def test_special_tokens_are_found_in_nested_content() -> None:
    source = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    text = TextModel(
        toy_tokenizer(), eos_ids=frozenset(), context_tokens=64, template=ChatTemplate(source)
    )
    assert 0 not in text.encode_chat(user([{"type": "text", "text": "x<|end|>"}]))


def test_special_tokens_in_a_tools_description_are_text() -> None:
    template = ChatTemplate("{{ tools | tojson }}")
    text = TextModel(toy_tokenizer(), eos_ids=frozenset(), context_tokens=64, template=template)
    tokens = text.encode_chat(user("x"), tools=[{"name": "a<|end|>"}])
    assert 0 not in tokens
    assert text.decode(tokens) == '[{"name": "a<|end|>"}]'


def test_characters_that_unicode_keeps_for_internal_use_change_nothing() -> None:
    text = toy_text()
    written = "\ufdd0<|end|>\ufdd1"
    tokens = text.encode_chat(user(written))
    assert written in toy_tokenizer().decode(list(tokens), skip_special_tokens=False)
    with pytest.raises(RequestError, match="noncharacter"):
        text.encode_chat(user("".join(chr(code) for code in range(0xFDD0, 0xFDF0))))


def test_a_megabyte_is_refused_before_anything_reads_it() -> None:
    text = toy_text(context_tokens=128)
    huge = "a" * 1_000_000
    started_s = time.process_time()
    for refused in ("prompt", "messages"):
        with pytest.raises(RequestError, match="characters: must be at most 2048") as told:
            text.encode_prompt(huge) if refused == "prompt" else text.encode_chat(user(huge))
        assert (told.value.status, told.value.field) == (413, refused)
    assert time.process_time() - started_s < 0.5


def test_a_prompt_longer_than_the_context_is_refused_with_the_limit() -> None:
    text = toy_text(context_tokens=16)
    with pytest.raises(RequestError, match="must be less than the context of 16") as told:
        text.encode_prompt("z" * 40)
    assert told.value.status == 413


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        toy_text().encode_prompt("")


def test_a_template_that_refuses_is_the_requests_error() -> None:
    with pytest.raises(RequestError, match="no role system"):
        toy_text().encode_chat([{"role": "system", "content": "x"}])
    with pytest.raises(RequestError, match="refuses them"):
        rendered("{{ messages[0].content + 1 }}", [{"content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include 'file' %}",
    ],
)
def test_a_template_can_not_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        rendered(source)


def test_a_templates_output_is_bounded() -> None:
    source = "{% for i in range(99999) %}xxxxxxxxxx{% endfor %}"
    with pytest.raises(RequestError, match="more than 1000 characters") as told:
        rendered(source)
    assert told.value.status == 413


def test_templates_have_what_their_authors_expect() -> None:
    assert rendered('{{ {"a": "<é>"} | tojson }}') == '{"a": "<é>"}'
    assert rendered('{{ {"a": 1} | tojson(indent=1) }}') == '{\n "a": 1\n}'
    assert rendered("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert rendered("{% generation %}x{% endgeneration %}") == "x"
    assert (
        rendered("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert rendered("{% if true %}\n  x\n  {% endif %}\n") == "  x\n"


def test_the_templates_variables_are_the_models_and_the_callers() -> None:
    source = "{{ bos_token }}{{ eos_token }}{{ mode }}{{ add_generation_prompt }}"
    text = TextModel(
        toy_tokenizer(),
        eos_ids=frozenset({0}),
        bos_id=1,
        eos_id=0,
        context_tokens=64,
        template=ChatTemplate(source),
    )
    tokens = text.encode_chat(user("x"), mode="quick")
    whole = toy_tokenizer().decode(list(tokens), skip_special_tokens=False)
    assert whole == "<|user|><|end|>quickTrue"
