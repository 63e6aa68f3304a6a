"""A second model guesses: the same tokens, sooner when it is good and cheap, else left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from toyengine import PAGED, SHAPES, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor, VirtualClock

from tidegate.engine.drafts import NOTHING, Ended, Wish
from tidegate.engine.drafts_model import ModelDrafter
from tidegate.engine.executor import ExecutorStep, Logits, PagedGeometry, SlotGeometry
from tidegate.engine.request import GenerationRequest
from tidegate.engine.settings import EngineSettings
from tidegate.engine.snapshot import EngineSnapshot
from tidegate.engine.speculation import Guessing, Speculator
from tidegate.errors import ExecutionError

Shape = PagedGeometry | SlotGeometry
VOCAB = 300


def drafter(
    shape: Shape = PAGED, *, step_tokens: int = 64, context_tokens: int = 128
) -> tuple[ToyExecutor, ModelDrafter]:
    """The same toy as the one that verifies: without a distortion it is always right."""
    toy = ToyExecutor(shape, step_tokens=step_tokens, context_tokens=context_tokens)
    return toy, ModelDrafter(toy, vocab=VOCAB)


def greedy(prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    async def scenario() -> tuple[int, ...]:
        plain = EngineSettings(speculation=False)
        async with serving(toy_engine(ToyExecutor(PAGED), eos=False, settings=plain)) as engine:
            request = ask("r", prompt, max_tokens=tokens, ignore_eos=True)
            return (await collect(engine.submit(request))).tokens

    return asyncio.run(scenario())


def wish(tokens: Sequence[int], *, most: int = 4, key: int = 0) -> Wish:
    return Wish(key=key, tokens=np.array(tokens, np.int64), most=most, remaining=99)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_guesses_its_own_greedy_answer_for_all_requests_at_once(shape: Shape) -> None:
    toy, model = drafter(shape)
    prompts = [tuple(range(5, 25)), (7, 8, 9), tuple(range(40, 60))]
    drafts = model.propose([wish(prompt, key=key) for key, prompt in enumerate(prompts)])
    assert [draft.tokens for draft in drafts] == [greedy(prompt, 4) for prompt in prompts]
    assert toy.record.steps == 4, "one to catch up and three of a token each"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("held", [0, 1, 3, 4])
def test_it_goes_on_from_what_held_and_computes_the_rest_only(shape: Shape, held: int) -> None:
    toy, model = drafter(shape)
    prompt = tuple(range(5, 25))
    (first,) = model.propose([wish(prompt)])
    wrong = (*prompt, *first.tokens[:held], 99)
    toy.record.rows.clear()
    (second,) = model.propose([wish(wrong)])
    assert second.tokens == greedy(wrong, 4)
    past, tokens = toy.record.rows[0][0]
    assert past == len(prompt) + min(held, 3)
    assert past + tokens == len(wrong)
    assert model.caught_up == 0


def test_a_long_prompt_is_caught_up_with_over_several_steps() -> None:
    _, model = drafter(step_tokens=16)
    prompt = tuple(range(5, 45))
    assert model.propose([wish(prompt)]) == [NOTHING]
    assert model.caught_up > 0
    assert model.propose([wish(prompt)]) == [NOTHING]
    (draft,) = model.propose([wish(prompt)])
    assert draft.tokens == greedy(prompt, 4)


def test_requests_without_room_wait_until_others_have_ended() -> None:
    small = PagedGeometry(block_tokens=4, blocks=7, bytes_per_token=8)
    _, model = drafter(small)
    prompts = [tuple(range(5, 25)), tuple(range(50, 70))]
    drafts = model.propose([wish(prompt, key=key) for key, prompt in enumerate(prompts)])
    assert drafts[0].tokens
    assert drafts[1] == NOTHING
    model.remember(Ended(key=0, tokens=np.array(prompts[0]), prompt_tokens=20))
    (draft,) = model.propose([wish(prompts[1], key=1)])
    assert draft.tokens == greedy(prompts[1], 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_request_that_does_not_share_finds_nothing_and_leaves_nothing(shape: Shape) -> None:
    toy, model = drafter(shape)
    prompt = tuple(range(5, 45))

    def computed(key: int, *, shared: bool) -> int:
        before = toy.record.tokens
        model.propose([replace(wish(prompt, key=key), shared=shared)])
        model.remember(Ended(key=key, tokens=np.array(prompt), prompt_tokens=40, shared=shared))
        return toy.record.tokens - before

    whole = computed(0, shared=False)
    assert computed(1, shared=True) == whole
    assert computed(2, shared=False) == whole
    assert computed(3, shared=True) < whole


def test_requests_that_end_between_two_steps_leave_no_kv_however_many_they_are() -> None:
    _, model = drafter()
    speculator = Speculator([], most_requests=1, eos_ids=frozenset(), paid=model)
    tokens = np.arange(5, 25, dtype=np.int64)
    free = model._kv.free
    model.propose([wish(range(5, 25), key=0)])
    for key in range(50):
        speculator.ended(Ended(key=key, tokens=tokens, prompt_tokens=20))
    # One left after its step was planned and before its guesses were made.
    late = Guessing(wishes=(wish(range(5, 25), key=7),), most=4, decoding=True)
    for _ in range(5):
        speculator.draft(late)
        speculator.timed(1.0)
        speculator.ended(Ended(key=7, tokens=tokens, prompt_tokens=20))
    assert model._kv.free == free


def test_beyond_its_own_context_or_the_others_tokens_nothing_is_guessed() -> None:
    _, model = drafter(context_tokens=24)
    assert model.propose([wish(range(5, 27))]) == [NOTHING]
    model = ModelDrafter(ToyExecutor(PAGED), vocab=3)
    assert model.propose([wish(range(5, 25))]) == [NOTHING]


def test_after_a_step_that_failed_it_starts_over() -> None:
    toy, model = drafter()
    prompt = tuple(range(5, 25))
    model.propose([wish(prompt)])
    toy.behaviour.fails = lambda step: True
    with pytest.raises(ExecutionError):
        model.propose([wish((*prompt, 9))])
    toy.behaviour.fails = lambda step: False
    (draft,) = model.propose([wish((*prompt, 9))])
    assert draft.tokens == greedy((*prompt, 9), 4)
    model._kv.check_integrity()


REQUESTS = [
    ask(f"r{n}", tuple(range(n + 3, n + 20)), max_tokens=60, temperature=n % 2, ignore_eos=True)
    for n in range(3)
]


def run(
    shape: Shape, *, draft_step_s: float, distorts: bool = False, requests: int = 3
) -> tuple[list[Collected], EngineSnapshot, float]:
    """An engine of one virtual second a step beside a draft model of another speed."""
    clock = VirtualClock()
    main = ToyExecutor(shape, behaviour=Behaviour(clock=clock, step_s=1.0))

    def wrong(step: ExecutorStep, logits: Logits) -> Logits:
        return -logits if distorts else logits

    toy = ToyExecutor(shape, behaviour=Behaviour(clock=clock, step_s=draft_step_s, distorts=wrong))
    model = ModelDrafter(toy, vocab=VOCAB, clock=clock)

    async def scenario() -> tuple[list[Collected], EngineSnapshot]:
        async with serving(toy_engine(main, drafters=(), draft_model=model)) as engine:
            answers = await asyncio.gather(
                *(collect(engine.submit(one)) for one in REQUESTS[:requests])
            )
            return answers, engine.snapshot()

    answers, now = asyncio.run(scenario())
    model._kv.check_integrity()
    return answers, now, clock.now_s


def alone(request: GenerationRequest) -> tuple[int, ...]:
    async def scenario() -> tuple[int, ...]:
        settings = EngineSettings(speculation=False)
        async with serving(toy_engine(ToyExecutor(PAGED), settings=settings)) as engine:
            return (await collect(engine.submit(replace(request)))).tokens

    return asyncio.run(scenario())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cheap_good_model_makes_the_same_answers_come_sooner(shape: Shape) -> None:
    answers, now, seconds = run(shape, draft_step_s=0.05)
    assert [answer.tokens for answer in answers] == [alone(one) for one in REQUESTS]
    assert now.accepted_draft_tokens > 40
    _, _, alone_s = run(shape, draft_step_s=0.05, requests=1)
    assert alone_s < 40, "a greedy answer of 60 tokens"
    assert seconds < 70, "one of them is sampled, which is not guessed so well"


def test_a_model_as_slow_as_the_other_or_never_right_is_left_alone() -> None:
    for slow, distorts in ((1.0, False), (0.2, True)):
        answers, now, seconds = run(PAGED, draft_step_s=slow, distorts=distorts)
        assert [answer.tokens for answer in answers] == [alone(one) for one in REQUESTS]
        assert now.drafts < 40
        assert seconds < 62 + 15
