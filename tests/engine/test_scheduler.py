"""The plan: budgets, ranks, preemption and that nobody starves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engine.scheduler import Budget, Candidate, Chunk, Plan, Room, State, plan

BUDGET = Budget(tokens=16, rows=4, chunk_tokens=16, prefill_reserve=4)
ROOM = Room(free=100, unit_tokens=4)


def decoding(key: int, *, tokens: int = 9, priority: int = 0, exclusive: int = 3) -> Candidate:
    return Candidate(
        key=key,
        tokens=tokens,
        computed=tokens - 1,
        priority=priority,
        held=-(-(tokens - 1) // 4),
        exclusive=exclusive,
    )


def waiting(
    key: int, tokens: int, *, priority: int = 0, deadline_s: float | None = None
) -> Candidate:
    return Candidate(key=key, tokens=tokens, computed=0, priority=priority, deadline_s=deadline_s)


def decide(
    *, running: tuple[Candidate, ...] = (), waiting: tuple[Candidate, ...] = (), room: Room = ROOM
) -> Plan:
    return plan(State(running=running, waiting=waiting, room=room), BUDGET)


def test_running_requests_come_first_and_a_prompt_takes_what_is_left() -> None:
    decided = decide(running=(decoding(0), decoding(1)), waiting=(waiting(2, 40),))
    assert decided.chunks == (
        Chunk(key=0, tokens=1),
        Chunk(key=1, tokens=1),
        Chunk(key=2, tokens=14),
    )
    assert decided.admitted == (2,)


def test_a_long_prompt_that_runs_leaves_every_answer_its_token() -> None:
    prompt = Candidate(key=0, tokens=90, computed=20, held=5)
    decided = decide(running=(prompt, decoding(1), decoding(2)))
    assert [chunk.tokens for chunk in decided.chunks] == [14, 1, 1]


def test_waiting_requests_start_by_priority_then_deadline_then_arrival() -> None:
    line = (
        waiting(0, 2, priority=1),
        waiting(1, 2),
        waiting(2, 2, deadline_s=9.0),
        waiting(3, 2, deadline_s=5.0),
        waiting(4, 2, priority=2, deadline_s=1.0),
    )
    assert decide(waiting=line).admitted == (3, 2, 1, 0)


def test_the_first_in_line_is_not_overtaken_by_one_that_would_fit() -> None:
    line = (waiting(0, 60), waiting(1, 2))
    assert decide(waiting=line, room=Room(free=5, unit_tokens=4)) == Plan(chunks=())


def test_admission_counts_the_whole_prompt_and_what_running_prompts_still_need() -> None:
    budget = replace(BUDGET, chunk_tokens=8)
    prompt = Candidate(key=0, tokens=40, computed=8, held=2)
    room = Room(free=12, unit_tokens=4)  # 8 of them are for the rest of key 0
    for tokens, admitted in ((16, (1,)), (17, ())):
        state = State(running=(prompt,), waiting=(waiting(1, tokens),), room=room)
        assert plan(state, budget).admitted == admitted


def test_headroom_is_kept_while_somebody_runs_and_not_otherwise() -> None:
    room = Room(free=4, unit_tokens=4, headroom=1)
    runner = replace(decoding(0), tokens=8, computed=7)
    assert decide(waiting=(waiting(1, 16),), room=room).admitted == (1,)
    assert decide(running=(runner,), waiting=(waiting(1, 16),), room=room).admitted == ()


def test_a_hit_takes_only_what_it_lacks_and_what_it_draws_from_the_free() -> None:
    hit = Candidate(key=0, tokens=17, computed=12, held=3, drawn=1)
    assert decide(waiting=(hit,), room=Room(free=3, unit_tokens=4)).admitted == (0,)
    assert decide(waiting=(hit,), room=Room(free=2, unit_tokens=4)).admitted == ()


def test_what_is_stored_is_loaded_beside_the_step_and_takes_none_of_its_tokens() -> None:
    stored = replace(waiting(1, 60), stored=56)
    state = State(running=(decoding(0),), waiting=(stored, waiting(2, 40)), room=ROOM)
    decided = plan(state, replace(BUDGET, load_tokens=40))
    assert decided.chunks == (
        Chunk(key=0, tokens=1),
        Chunk(key=1, tokens=40, loaded=True),
        Chunk(key=2, tokens=15),
    )


def test_loads_share_their_own_budget_by_rank_and_the_rest_waits_its_turn() -> None:
    first = Candidate(key=0, tokens=60, computed=8, held=2, stored=24)
    second = Candidate(key=1, tokens=60, computed=8, held=2, stored=24)
    line = (replace(waiting(2, 30), stored=28), waiting(3, 2))
    state = State(running=(second, first), waiting=line, room=ROOM)
    decided = plan(state, replace(BUDGET, load_tokens=32))
    assert decided.chunks == (
        Chunk(key=0, tokens=24, loaded=True),
        Chunk(key=1, tokens=8, loaded=True),
    )
    assert decided.admitted == (), "nobody overtakes the first in line"


def test_a_load_gets_no_more_kv_than_there_is() -> None:
    loading = Candidate(key=0, tokens=60, computed=8, held=2, stored=24)
    state = State(running=(loading,), waiting=(), room=Room(free=3, unit_tokens=4))
    assert plan(state, replace(BUDGET, load_tokens=100)).chunks == (
        Chunk(key=0, tokens=12, loaded=True),
    )


def test_when_kv_ends_the_lowest_rank_makes_room_and_nobody_is_admitted() -> None:
    decided = decide(
        running=(decoding(0), decoding(1, priority=1), decoding(2)),
        waiting=(waiting(3, 2),),
        room=Room(free=0, unit_tokens=4),
    )
    assert decided.preempted == (1,)
    assert [chunk.key for chunk in decided.chunks] == [0, 2]
    assert decided.admitted == ()


def test_the_lowest_preempts_itself_rather_than_a_better_one() -> None:
    better = decoding(0, tokens=8)
    decided = decide(running=(better, decoding(1)), room=Room(free=0, unit_tokens=4))
    assert decided.preempted == (1,)
    assert decided.chunks == (Chunk(key=0, tokens=1),)


def test_a_prompt_shrinks_its_chunk_before_anybody_is_preempted() -> None:
    prompt = Candidate(key=0, tokens=40, computed=8, held=2)
    decided = decide(running=(prompt,), room=Room(free=1, unit_tokens=4))
    assert decided == Plan(chunks=(Chunk(key=0, tokens=4),))


def test_an_interactive_request_takes_the_row_of_a_background_one() -> None:
    running = (*(decoding(key) for key in range(3)), decoding(3, priority=2))
    decided = decide(running=running, waiting=(waiting(4, 2),))
    assert decided.preempted == (3,)
    assert [chunk.key for chunk in decided.chunks] == [0, 1, 2]


def test_no_request_makes_way_for_its_own_class() -> None:
    running = tuple(decoding(key) for key in range(4))
    decided = decide(running=running, waiting=(waiting(4, 2, deadline_s=0.0),))
    assert decided.preempted == ()
    assert len(decided.chunks) == 4


def test_a_slot_is_a_unit_as_long_as_the_context() -> None:
    room = Room(free=1, unit_tokens=128)
    decided = decide(waiting=(waiting(0, 100), waiting(1, 1)), room=room)
    assert decided.admitted == (0,)


def guessing(key: int, draft: int, *, tokens: int = 9) -> Candidate:
    return replace(decoding(key, tokens=tokens), draft=draft)


SPECULATING = replace(BUDGET, logits=16)


def test_running_requests_guess_with_what_is_left_of_tokens_and_logits() -> None:
    state = State(running=(guessing(0, 8), decoding(1), guessing(2, 3)), waiting=(), room=ROOM)
    decided = plan(state, SPECULATING)
    assert [chunk.draft for chunk in decided.chunks] == [8, 0, 3]
    assert decided.draft_tokens == 13
    assert plan(state, replace(SPECULATING, logits=5)).draft_tokens == 2
    assert plan(state, replace(SPECULATING, logits=3)).draft_tokens == 0
    assert plan(state, BUDGET).draft_tokens == 0


def test_a_prompt_takes_the_tokens_before_any_guess_does() -> None:
    state = State(running=(guessing(0, 8),), waiting=(waiting(1, 13),), room=ROOM)
    decided = plan(state, SPECULATING)
    assert [chunk.tokens for chunk in decided.chunks] == [1, 13]
    assert decided.draft_tokens == 2


def test_guesses_take_free_kv_only_and_never_what_a_running_prompt_will_need() -> None:
    one = guessing(0, 8, tokens=10)  # in 3 units of 4, so 2 guesses fit without another
    for free, fits in ((0, 2), (1, 6), (2, 8)):
        state = State(running=(one,), waiting=(), room=Room(free=free, unit_tokens=4))
        decided = plan(state, SPECULATING)
        assert decided.preempted == ()
        assert decided.chunks == (Chunk(key=0, tokens=1, draft=fits),)
    prompt = Candidate(key=1, tokens=40, computed=8, held=2)
    budget = replace(SPECULATING, chunk_tokens=4)
    state = State(running=(one, prompt), waiting=(), room=Room(free=8, unit_tokens=4))
    assert plan(state, budget).chunks[0].draft == 2


def test_nobody_guesses_in_a_step_that_preempts() -> None:
    running = (guessing(0, 8, tokens=8), guessing(1, 8))
    decided = plan(
        State(running=running, waiting=(), room=Room(free=0, unit_tokens=4)), SPECULATING
    )
    assert decided.preempted == (1,)
    assert decided.draft_tokens == 0


@st.composite
def states(draw: st.DrawFn) -> tuple[State, Budget]:
    unit_tokens = draw(st.integers(1, 8))
    budget = Budget(
        tokens=draw(st.integers(1, 24)),
        rows=draw(st.integers(1, 6)),
        chunk_tokens=draw(st.integers(1, 24)),
        prefill_reserve=draw(st.integers(0, 24)),
        logits=draw(st.integers(0, 30)),
    )
    running = []
    for key in range(draw(st.integers(0, budget.most_running))):
        computed = draw(st.integers(0, 30))
        held = -(-computed // unit_tokens) + draw(st.integers(0, 1))
        running.append(
            Candidate(
                key=key,
                tokens=computed + draw(st.integers(1, 20)),
                computed=computed,
                priority=draw(st.integers(0, 2)),
                held=held,
                exclusive=draw(st.integers(0, held)),
                draft=draw(st.integers(0, 15)),
            )
        )
    line = []
    for key in range(10, 10 + draw(st.integers(0, 5))):
        units = draw(st.integers(0, 3))
        line.append(
            Candidate(
                key=key,
                tokens=units * unit_tokens + draw(st.integers(1, 20)),
                computed=units * unit_tokens,
                priority=draw(st.integers(0, 2)),
                deadline_s=draw(st.none() | st.floats(0, 9)),
                held=units,
                drawn=draw(st.integers(0, units)),
            )
        )
    room = Room(
        free=draw(st.integers(0, 20)), unit_tokens=unit_tokens, headroom=draw(st.integers(0, 2))
    )
    return State(running=tuple(running), waiting=tuple(line), room=room), budget


@settings(max_examples=400, deadline=None)
@given(states())
def test_a_plan_is_always_within_tokens_rows_and_kv(case: tuple[State, Budget]) -> None:
    state, budget = case
    decided = plan(state, budget)
    known = {one.key: one for one in (*state.running, *state.waiting)}
    assert sum(chunk.tokens for chunk in decided.chunks) <= budget.tokens
    assert len(decided.chunks) <= budget.rows
    assert len({chunk.key for chunk in decided.chunks}) == len(decided.chunks)
    free = state.room.free + sum(known[key].exclusive for key in decided.preempted)
    free -= sum(known[key].drawn for key in decided.admitted)
    for chunk in decided.chunks:
        one = known[chunk.key]
        assert 1 <= chunk.tokens <= min(one.missing, budget.chunk_tokens)
        assert 0 <= chunk.draft <= (one.draft if chunk.tokens == one.missing else 0)
        stored = one.computed + chunk.tokens + chunk.draft
        free -= max(0, state.room.units(stored) - one.held)
    assert free >= 0
    own = sum(chunk.tokens for chunk in decided.chunks)
    assert own + decided.draft_tokens <= budget.tokens
    assert decided.draft_tokens <= max(0, budget.logits - len(decided.chunks))


@settings(max_examples=400, deadline=None)
@given(states())
def test_guesses_change_nothing_else_of_a_plan(case: tuple[State, Budget]) -> None:
    state, budget = case
    decided, without = plan(state, budget), plan(state, replace(budget, logits=0))
    assert (decided.admitted, decided.preempted) == (without.admitted, without.preempted)
    assert tuple(replace(chunk, draft=0) for chunk in decided.chunks) == without.chunks


@settings(max_examples=400, deadline=None)
@given(states())
def test_a_plan_respects_rank_and_never_stalls_a_running_request(
    case: tuple[State, Budget],
) -> None:
    state, budget = case
    decided = plan(state, budget)
    chunked = {chunk.key for chunk in decided.chunks}
    ranked = sorted(state.running, key=lambda one: one.rank)
    kept = [one.key for one in ranked if one.key not in decided.preempted]
    assert set(decided.preempted) == {one.key for one in ranked[len(kept) :]}
    assert chunked == {*kept, *decided.admitted}
    line = [one.key for one in sorted(state.waiting, key=lambda one: one.rank)]
    assert list(decided.admitted) == line[: len(decided.admitted)]
    assert not (decided.preempted and decided.admitted)


@dataclass
class Life:
    """One request in the simulation below: its prompt, its answer and what it has so far."""

    key: int
    prompt: int
    answer: int
    priority: int
    computed: int = 0
    generated: int = 0
    history: list[str] = field(default_factory=list)

    def candidate(self, room: Room) -> Candidate:
        held = room.units(self.computed)
        return Candidate(
            key=self.key,
            tokens=self.prompt + self.generated,
            computed=self.computed,
            priority=self.priority,
            held=held,
            exclusive=held,
        )


@pytest.mark.parametrize("unit_tokens", [1, 4, 32])
@settings(max_examples=60, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), st.integers(0, 30)),
        min_size=1,
        max_size=12,
    ),
    spare=st.integers(0, 3),
    tokens=st.integers(1, 20),
)
def test_every_request_finishes_whatever_order_they_arrive_in(
    unit_tokens: int, lives: list[tuple[int, int, int, int]], spare: int, tokens: int
) -> None:
    budget = Budget(tokens=tokens, rows=4, chunk_tokens=7, prefill_reserve=tokens // 4)
    units = -(-32 // unit_tokens) + spare
    arrivals = [
        (at, Life(key=key, prompt=prompt, answer=answer, priority=priority))
        for key, (prompt, answer, priority, at) in enumerate(lives)
    ]
    alive: dict[int, Life] = {}
    running: set[int] = set()
    for step in range(4000):
        alive |= {life.key: life for at, life in arrivals if at == step}
        if not alive and step > 30:
            return
        used = sum(-(-alive[key].computed // unit_tokens) for key in running)
        room = Room(free=units - used, unit_tokens=unit_tokens)
        assert room.free >= 0
        state = State(
            running=tuple(alive[key].candidate(room) for key in running),
            waiting=tuple(
                life.candidate(room) for life in alive.values() if life.key not in running
            ),
            room=room,
        )
        decided = plan(state, budget)
        for key in decided.preempted:
            running.discard(key)
            alive[key].computed = 0
        running |= set(decided.admitted)
        for chunk in decided.chunks:
            life = alive[chunk.key]
            life.computed += chunk.tokens
            if life.computed == life.prompt + life.generated:
                life.generated += 1
            if life.generated == life.answer:
                running.discard(life.key)
                del alive[life.key]
    pytest.fail(f"{len(alive)} requests never finished")
