"""The assistant's corpus, tokenizer, training and checkpoints."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch

batches: Any = import_module("assistant.batches")
checkpoint: Any = import_module("assistant.checkpoint")
corpus: Any = import_module("assistant.corpus")
domain: Any = import_module("assistant.domain")
evaluate: Any = import_module("assistant.evaluate")
growth: Any = import_module("assistant.growth")
model: Any = import_module("assistant.model")
tokenizer: Any = import_module("assistant.tokenizer")
train: Any = import_module("assistant.train")

ASSISTANT = Path(corpus.__file__).parent
TINY_MIX = batches.Mix(
    rows=2, row_tokens=128, long_every=4, long_rows=1, long_row_tokens=512, long_table_rows=(13, 16)
)
TINY_SHAPE = model.Shape(width=32, layers=2, heads=2, kv_heads=1, inner=64, context=256)
TINY_RECIPE = train.Recipe(steps=6, warm_up_steps=2, decay_steps=2, save_every=3, log_every=3)
JSON_KINDS = {"command", "read", "value", "timed", "paraphrase", "schedule", "conditional"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep tiny tensors on one thread: on a busy machine the others only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    """Four hundred test examples."""
    return list(corpus.generate("test", count=400))


@pytest.fixture(scope="module")
def conversations() -> list[Any]:
    """Five hundred training conversations."""
    weights = batches.Mix().tier_weights
    return [corpus.training_conversation(seed, tier_weights=weights) for seed in range(500)]


@pytest.fixture(scope="module")
def small_tokenizer(conversations: list[Any]) -> Any:
    """Return a tokenizer trained on a few conversations."""
    texts = [m["content"] for c in conversations[:150] for m in c.messages()]
    return tokenizer.train_tokenizer(texts)


def shown_table(example: Any) -> dict[tuple[str, str], int]:
    """Read the table back from the messages, independently of the generator's objects."""
    lines = "\n".join(message["content"] for message in example.messages).splitlines()
    table, heading = {}, ""
    for line in lines:
        if re.fullmatch(r"(temperature|humidity|light|noise|power):", line):
            heading = line[:-1]
        elif heading and (row := re.fullmatch(r"([a-zA-Z ]+) (\d+)", line)):
            table[row[1], heading] = int(row[2])
    return table


def asked_of(example: Any) -> str:
    """Return the question without its table."""
    content: str = example.messages[-1]["content"]
    return content.splitlines()[-1]


def sensor_asked(example: Any, table: dict[tuple[str, str], int]) -> str:
    """Return the sensor a question is about, by its name or by its comparing words."""
    asked = asked_of(example)
    for sensor in domain.SENSORS:
        words = (sensor.name, sensor.more, sensor.most, sensor.least)
        if any(re.search(rf"\b{word}\b", asked) for word in words):
            name: str = sensor.name
            return name
    raise AssertionError(f"no sensor in {asked!r} about {table}")


def named_values(example: Any) -> list[int]:
    """Return the readings that a question names, in the order it names them."""
    table, asked = shown_table(example), asked_of(example)
    sensor = sensor_asked(example, table)
    places = {
        match.start(): value
        for (place, measured), value in table.items()
        if measured == sensor and (match := re.search(rf"the {place}\b", asked))
    }
    return [places[start] for start in sorted(places)]


def limited(example: Any) -> list[str]:
    """Return the places on the asked side of the asked limit."""
    table = shown_table(example)
    sensor = sensor_asked(example, table)
    found = re.search(r"(above|below) (\d+)", asked_of(example))
    assert found is not None
    side, limit = found[1], int(found[2])
    return [
        place
        for (place, measured), value in table.items()
        if measured == sensor and (value > limit if side == "above" else value < limit)
    ]


def of_kind(examples: list[Any], kind: str) -> list[Any]:
    """Return the examples of a kind, of which there must be some."""
    found = [example for example in examples if example.kind == kind]
    assert found
    return found


def test_the_generator_is_a_function_of_split_and_seed() -> None:
    again = [list(corpus.generate("test", count=20, first=40)) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] == list(corpus.generate("test", count=60))[40:]


def test_the_splits_have_disjoint_seeds() -> None:
    ranges = sorted(corpus.SEEDS.values(), key=lambda seeds: seeds.start)
    assert all(left.stop <= right.start for left, right in itertools.pairwise(ranges))


def test_a_prompt_belongs_to_one_split_only(examples: list[Any], conversations: list[Any]) -> None:
    trained = {
        (str(c.table), turn.question) for c in conversations for turn in c.turns if turn.tier > 0
    }
    measured = {(str(e.table), asked_of(e)) for e in examples}
    validated = {(str(e.table), asked_of(e)) for e in corpus.generate("validation", count=200)}
    assert not trained & measured
    assert not trained & validated
    assert not measured & validated


def test_held_out_combinations_are_absent_from_training(conversations: list[Any]) -> None:
    actions = 0
    for turn in (turn for c in conversations for turn in c.turns if turn.kind in JSON_KINDS):
        written = json.loads(turn.answer)
        for action in written if isinstance(written, list) else [written]:
            if action["action"] == "read":
                assert not domain.is_held_out("reading", action["room"], action["sensor"])
                continue
            verb = action.get("state", "value")
            assert not domain.is_held_out(action["device"], action["room"], verb)
            actions += 1
    assert actions > 200


def test_the_test_split_asks_for_held_out_combinations(examples: list[Any]) -> None:
    assert sum(example.held_out for example in examples) > 60
    for example in of_kind(examples, "command"):
        action = json.loads(example.answer)
        held_out = domain.is_held_out(action["device"], action["room"], action["state"])
        assert held_out == example.held_out


def test_the_tiers_come_in_turn(examples: list[Any]) -> None:
    assert [example.tier for example in examples[:8]] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_every_action_is_one_line_of_json(examples: list[Any]) -> None:
    for example in (e for e in examples if e.kind in JSON_KINDS):
        action = json.loads(example.answer)
        assert json.dumps(action, separators=(",", ":")) == example.answer
        assert isinstance(action, list) == (example.kind == "schedule")


def test_a_lookup_quotes_the_only_matching_line_of_the_table(examples: list[Any]) -> None:
    for example in of_kind(examples, "lookup"):
        table, asked = shown_table(example), asked_of(example)
        units = {sensor.name: sensor.unit for sensor in domain.SENSORS}
        matching = [
            f"{place} {value} {units[sensor]}"
            for (place, sensor), value in table.items()
            if re.search(rf"\b{place}\b", asked) and sensor in asked
        ]
        assert [example.answer] == matching


def test_a_missing_reading_is_really_missing(examples: list[Any]) -> None:
    for example in of_kind(examples, "missing"):
        assert example.answer == "no reading"
        for place, sensor in shown_table(example):
            asked = asked_of(example)
            assert not (re.search(rf"\b{place}\b", asked) and sensor in asked)


def test_a_sum_quotes_its_readings_and_ends_at_the_total(examples: list[Any]) -> None:
    for example in of_kind(examples, "sum"):
        quoted, working = example.answer.split(": ")
        values = named_values(example)
        assert [int(part.split()[-1]) for part in quoted.split(", ")] == values
        steps = re.findall(r"(\d+)\+(\d+)=(\d+)", working)
        assert [int(n) for n in (steps[0][0], *(step[1] for step in steps))] == values
        assert all(int(a) + int(b) == int(c) for a, b, c in steps)
        assert int(steps[-1][2]) == sum(values)


def test_a_difference_takes_the_smaller_from_the_larger(examples: list[Any]) -> None:
    for example in of_kind(examples, "difference"):
        high, low = sorted(named_values(example), reverse=True)
        assert example.answer.split(": ")[1].split()[0] == f"{high}-{low}={high - low}"


def test_bare_sums_and_differences_are_right(examples: list[Any]) -> None:
    for example in of_kind(examples, "arithmetic"):
        left, sign, right, result = re.findall(r"[-+]|\d+", example.answer)
        expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert int(result) == expected


def test_a_comparison_says_which_is_larger(examples: list[Any]) -> None:
    for example in of_kind(examples, "compare"):
        left, right = named_values(example)
        quoted, verdict = example.answer.split(": ")
        assert [int(part.split()[-1]) for part in quoted.split(", ")] == [left, right]
        assert verdict == ("yes" if left > right else "no")


def test_an_extreme_is_the_extreme_of_its_sensor(examples: list[Any]) -> None:
    for example in of_kind(examples, "extreme"):
        table = shown_table(example)
        name = sensor_asked(example, table)
        sensor = next(sensor for sensor in domain.SENSORS if sensor.name == name)
        readings = {place: value for (place, which), value in table.items() if which == name}
        pick = max if re.search(rf"\b{sensor.most}\b", asked_of(example)) else min
        place = pick(readings, key=lambda place: readings[place])
        assert example.answer == f"{place} {readings[place]} {sensor.unit}"


def test_counts_and_lists_agree_with_the_limit(examples: list[Any]) -> None:
    for kind in ("count", "which"):
        for example in of_kind(examples, kind):
            places = limited(example)
            listed = ", ".join(places) or "nowhere"
            assert example.answer == (f"{listed}: {len(places)}" if kind == "count" else listed)


def test_a_condition_chooses_the_action_by_the_reading(examples: list[Any]) -> None:
    for example in of_kind(examples, "conditional"):
        found = re.match(
            r"If the (.+) (\w+) is (above|below) (\d+), (.+), otherwise (.+)\.", asked_of(example)
        )
        assert found is not None
        place, sensor, side, limit, first, second = found.groups()
        value = shown_table(example)[place, sensor]
        holds = value > int(limit) if side == "above" else value < int(limit)
        action = json.loads(example.answer)
        said = first if holds else second
        assert action["device"] in said
        assert action["room"] in said


def test_the_tokenizer_returns_any_text_and_splits_every_number(small_tokenizer: Any) -> None:
    for text in ("Readings:\nnoise:\nbay C 7", "Grüße, 温度 21 °C 🔥", "  a\t\x00b\n\n"):
        ids = small_tokenizer.encode(text, add_special_tokens=False).ids
        assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.encode("a 1994").tokens[-4:] == ["Ġ1", "9", "9", "4"]


def test_only_the_assistants_words_are_learned(
    small_tokenizer: Any, conversations: list[Any]
) -> None:
    for conversation in conversations[:50]:
        messages = conversation.messages()
        ids, learned = tokenizer.encode_messages(small_tokenizer, messages)
        text = tokenizer.render(messages, add_generation_prompt=False)
        assert small_tokenizer.encode(text, add_special_tokens=False).ids == ids
        answers = "".join(f"{turn.answer}<|end|>" for turn in conversation.turns)
        kept = [token for token, flag in zip(ids, learned, strict=True) if flag]
        assert small_tokenizer.decode(kept, skip_special_tokens=False) == answers


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_jinja_template_renders_what_training_saw(
    conversations: list[Any], add_generation_prompt: bool
) -> None:
    template = jinja2.Environment().from_string(tokenizer.CHAT_TEMPLATE)
    for conversation in conversations[:20]:
        messages = conversation.messages()
        assert template.render(
            messages=messages, add_generation_prompt=add_generation_prompt
        ) == tokenizer.render(messages, add_generation_prompt=add_generation_prompt)


def test_a_packed_batch_keeps_every_conversation_whole(small_tokenizer: Any) -> None:
    batch = batches.draw_batch(small_tokenizer, TINY_MIX, 0, step=0)
    learned = batch.targets >= 0
    following = batch.ids.roll(-1, dims=1)
    assert (batch.targets[learned] == following[learned]).all()
    assert batch.next_seed > 0
    for segment in batch.segments.unique()[1:]:
        tokens = batch.ids[batch.segments == segment]
        assert small_tokenizer.id_to_token(int(tokens[0])) in ("<|user|>", "<|system|>")
        assert int(tokens[-1]) == tokenizer.END_ID


def test_packed_conversations_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    llama = model.Llama(TINY_SHAPE)
    ids = torch.randint(0, 1024, (1, 20))
    segments = torch.tensor([[1] * 12 + [2] * 8])
    together = llama.model(ids, model.packed_mask(segments))
    alone = llama.model(ids[:, 12:], model.packed_mask(segments[:, 12:]))
    torch.testing.assert_close(together[:, 12:], alone, atol=1e-5, rtol=1e-4)


def test_attention_equals_the_library_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 32) for heads in (6, 2, 2))
    mask = model.packed_mask(torch.ones(2, 9, dtype=torch.long))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(model.attend(q, k, v, mask), expected)


def test_the_first_heads_begin_by_looking_back() -> None:
    torch.manual_seed(0)
    llama = model.Llama(model.SHAPES["edge"])
    tokens, size = 24, llama.shape.head_size
    first = llama.model.layers[0]
    x = first.input_layernorm(llama.model.embed_tokens(torch.randint(0, 1024, (1, tokens))))
    cos, sin = model.rotation(llama.shape, tokens, x.device)
    q, k = (
        model.rotate(projection(x).view(1, tokens, -1, size).transpose(1, 2), cos, sin)[0]
        for projection in (first.self_attn.q_proj, first.self_attn.k_proj)
    )
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for head in range(model.LOOK_BACK):
        scores = (q[head] @ k[0].T / size**0.5).masked_fill(~causal, -torch.inf)
        back = head + 1
        assert scores.softmax(dim=-1).diagonal(-back)[8:].mean() > 0.4


def test_a_grown_model_computes_what_the_small_one_did() -> None:
    torch.manual_seed(0)
    common = {"context": 64, "norm_epsilon": 1e-12}
    small_shape = model.Shape(width=48, layers=2, heads=4, kv_heads=1, inner=64, **common)
    large_shape = model.Shape(width=80, layers=5, heads=6, kv_heads=2, inner=96, **common)
    small, large = model.Llama(small_shape), model.Llama(large_shape)
    for parameter in small.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    growth.grow(small, large)
    ids = torch.randint(0, 1024, (2, 12))
    mask = model.packed_mask(torch.ones_like(ids))
    expected, found = (llama.logits(llama.model(ids, mask)) for llama in (small, large))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_model_does_not_grow_into_a_smaller_one() -> None:
    with pytest.raises(ValueError, match="must not shrink"):
        growth.check_growth(model.SHAPES["cloud"], model.SHAPES["edge"])


def test_a_resumed_training_equals_an_uninterrupted_one(
    small_tokenizer: Any, tmp_path: Path
) -> None:
    def finish(name: str, run: Any) -> Any:
        train.train(
            run,
            TINY_RECIPE,
            TINY_MIX,
            small_tokenizer,
            state_path=tmp_path / f"{name}.pt",
            log_path=tmp_path / f"{name}.jsonl",
        )
        return run

    device = torch.device("cpu")
    whole = finish("whole", train.start_run(TINY_SHAPE, TINY_RECIPE, device))
    halted = train.start_run(TINY_SHAPE, TINY_RECIPE, device)
    for _ in range(3):
        train.take_step(halted, TINY_RECIPE, TINY_MIX, small_tokenizer, halted.model.model)
    train.save_state(halted, tmp_path / "resumed.pt")
    resumed = train.start_run(TINY_SHAPE, TINY_RECIPE, device)
    resumed.restore(torch.load(tmp_path / "resumed.pt", weights_only=True))
    finish("resumed", resumed)
    assert (
        (resumed.step, resumed.next_seed) == (whole.step, whole.next_seed) == (6, whole.next_seed)
    )
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_exact_match_agrees_with_greedy_decoding(small_tokenizer: Any) -> None:
    torch.manual_seed(0)
    llama = model.Llama(TINY_SHAPE).eval()
    prompt = [3, 40, 41, 4]
    written: list[int] = []
    while len(written) < 4:
        ids = torch.tensor([prompt + written])
        hidden = llama.model(ids, model.packed_mask(torch.ones_like(ids)))
        written.append(int(llama.logits(hidden[0, -1]).argmax()))
    other = [*written[:-1], written[-1] ^ 1]
    rows = [(prompt + written, 4), (prompt + other, 4), (prompt + written[:2], 2)]
    assert evaluate.exact_matches(llama, rows) == [True, False, True]


def test_an_exported_checkpoint_loads_back(small_tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = model.Llama(TINY_SHAPE)
    checkpoint.export(llama, small_tokenizer, tmp_path)
    loaded, loaded_tokenizer = checkpoint.load(tmp_path)
    assert loaded.shape == llama.shape
    assert loaded_tokenizer.get_vocab() == small_tokenizer.get_vocab()
    for left, right in zip(llama.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(left.bfloat16().float(), right)


@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_a_committed_checkpoint_is_complete(name: str) -> None:
    folder = ASSISTANT / name
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 1024
    assert checkpoint.shape_of(config) == model.SHAPES[name]
    llama, loaded_tokenizer = checkpoint.load(folder)
    assert loaded_tokenizer.get_vocab_size() == config["vocab_size"]
    for layer in (module for module in llama.modules() if isinstance(module, torch.nn.Linear)):
        assert layer.in_features % 128 == 0
    for file, key in (("tokenizer_config.json", "eos_token"), ("generation_config.json", None)):
        settings = json.loads((folder / file).read_text())
        assert key is None or settings[key] == "<|end|>"
    assert (folder / "chat_template.jinja").read_text() == tokenizer.CHAT_TEMPLATE


def test_both_checkpoints_together_stay_below_32_mb() -> None:
    files = [file for name in ("edge", "cloud") for file in (ASSISTANT / name).rglob("*")]
    assert sum(file.stat().st_size for file in files) < 32_000_000
