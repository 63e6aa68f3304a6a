"""The pure parts of the governor: requests, heat, the cloud's times."""

from __future__ import annotations

from pathlib import Path

import pytest
from energyboard import BOARD, RADIO
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.cost import RadioCost
from tidegate.edge.energy.governor_cloud import CloudTimes, network_kind, radio_of
from tidegate.edge.energy.governor_heat import HeatWatch, poles_of
from tidegate.edge.energy.governor_requests import Ask, Requests
from tidegate.edge.energy.heat import HeatPole
from tidegate.edge.energy.profile import Pole, Profile, Thermal
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.sensors.sample import Sample
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport, StepShare

ASK = Ask(id="a", kind="chat", prompt_tokens=100, most_tokens=500)
POLES = (HeatPole(r_kw=1.0, tau_s=5.0), HeatPole(r_kw=2.0, tau_s=200.0))


def share(
    computed: int, past: int, sampled: int, *, prompt: bool, request_id: str = "a"
) -> StepShare:
    return StepShare(
        request_id=RequestId(request_id),
        computed_tokens=computed,
        past_tokens=past,
        is_prompt=prompt,
        sampled_tokens=sampled,
    )


def step(*shares: StepShare, elapsed_s: float = 0.1, ended_s: float = 1.0) -> StepReport:
    return StepReport(ended_s=ended_s, elapsed_s=elapsed_s, shares=shares)


def profile() -> Profile:
    return read_library().profile("ryzen-laptop")


# Requests


def test_a_prompt_is_counted_down_by_what_was_computed_and_what_was_reused() -> None:
    requests = Requests()
    requests.begin(ASK)
    assert requests.running()[0].prefill_tokens == 100
    assert not requests.stepped(step(share(20, 48, 0, prompt=True)), 0.05)
    assert requests.running()[0].prefill_tokens == 32
    assert requests.stepped(step(share(32, 68, 1, prompt=True)), 0.05), "the next may begin"
    (running,) = requests.running()
    assert (running.prefill_tokens, running.context_tokens) == (0, 101)
    assert requests.last_step_s("a") == 1.0


def test_an_answer_that_lost_its_place_is_computed_again_in_front_of_its_rest() -> None:
    requests = Requests()
    requests.begin(ASK)
    requests.stepped(step(share(100, 0, 1, prompt=True)), 0.05)
    for there in range(1, 5):
        requests.stepped(step(share(1, 99 + there, 1, prompt=False)), 0.05)
    requests.stepped(step(share(40, 0, 0, prompt=True)), 0.05)
    (running,) = requests.running()
    assert (running.prefill_tokens, running.context_tokens) == (65, 105)


def test_an_answer_without_an_end_of_its_own_has_just_so_many_tokens_left() -> None:
    requests = Requests()
    ask = Ask(id="a", kind="chat", prompt_tokens=10, most_tokens=20, exact=True)
    requests.hold(ask, 3.0)
    (waiting,) = requests.waiting()
    assert (waiting.output_mean, waiting.output_p90, waiting.output_most) == (20, 20, 20)
    requests.begin(ask)
    requests.stepped(step(share(10, 0, 8, prompt=True)), 0.05)
    assert requests.running()[0].output_most == 12
    assert requests.waiting() == []


@given(st.lists(st.integers(1, 400), min_size=1, max_size=50), st.integers(0, 450))
def test_what_is_left_grows_with_the_quantile_and_is_within_the_limit(
    lengths: list[int], given_tokens: int
) -> None:
    requests = Requests()
    for length in lengths:
        requests.learn(ASK, length)
    requests.begin(ASK)
    requests.stepped(step(share(100, 0, given_tokens, prompt=True)), 0.05)
    (running,) = requests.running()
    assert 1 <= running.output_p90 <= running.output_most
    assert running.output_mean >= 1
    assert running.output_most <= max(1, 500 - given_tokens)


def test_classes_learn_their_own_lengths() -> None:
    requests = Requests()
    for _ in range(50):
        requests.learn(ASK, 3)
    other = Ask(id="b", kind="completion", prompt_tokens=100, most_tokens=500)
    assert requests.seen(ASK, 0.0).output_mean < 25 < requests.seen(other, 0.0).output_mean


def test_answers_stand_still_while_a_prompt_of_another_is_computed() -> None:
    requests = Requests()
    requests.begin(ASK)
    both = (share(1, 100, 1, prompt=False), share(64, 0, 0, prompt=True, request_id="b"))
    for _ in range(200):
        requests.stepped(step(*both, elapsed_s=1.0), 0.25)
    assert requests.stalled_share == pytest.approx(0.75, abs=0.03)
    for _ in range(200):
        requests.stepped(step(both[0], elapsed_s=1.0), 0.25)
    assert requests.stalled_share < 0.05


# Heat


def seen(celsius: float | None, at_s: float, watts: float = 10.0) -> Sample:
    return Sample(
        at_s=at_s,
        joules=watts * at_s,
        watts=watts,
        scope="board",
        kind="measured",
        celsius=celsius,
        soft_c=70.0,
        hard_c=85.0,
    )


@given(st.lists(st.tuples(st.floats(20, 95), st.floats(0, 30)), min_size=1, max_size=30))
def test_the_prediction_starts_from_the_reading(readings: list[tuple[float, float]]) -> None:
    watch = HeatWatch(POLES)
    for number, (celsius, watts) in enumerate(readings):
        outlook = watch.see(seen(celsius, number * 0.5, watts), BOARD)
    assert watch._heat is not None
    assert watch._heat.now_c == pytest.approx(readings[-1][0])
    # Without power it cools down, and not below the coldest surroundings.
    assert outlook.rest_k <= readings[-1][0] - 70 + 1e-6
    assert outlook.warming_kw > 0


def test_only_modes_below_the_hard_limit_are_live() -> None:
    watch = HeatWatch(POLES)
    assert watch.see(seen(50.0, 0.0), BOARD).fastest is None
    caps = [watch.see(seen(celsius, celsius), BOARD).fastest for celsius in (60, 70, 78, 84, 90)]
    live = [2 if cap is None else cap for cap in caps]
    assert live == sorted(live, reverse=True)
    assert live[-1] == 0


def test_a_board_without_poles_loses_modes_one_by_one_and_gets_them_back() -> None:
    watch = HeatWatch(())
    caps = [watch.see(seen(72.0, at_s), BOARD).fastest for at_s in (0, 5, 10, 15, 20, 30)]
    assert caps == [1, 1, 0, 0, 0, 0]
    caps = [watch.see(seen(60.0, at_s), BOARD).fastest for at_s in (35, 40, 45, 50, 60)]
    assert caps == [1, 1, None, None, None]
    assert watch.see(seen(84.5, 61), BOARD).fastest == 0


def test_poles_without_a_time_predict_nothing() -> None:
    thermal = Thermal(pole=(Pole(r_kw=0.5, tau_s=5), Pole(r_kw=2.0)))
    assert poles_of(thermal) == (HeatPole(r_kw=0.5, tau_s=5),)


# The cloud


def test_answers_correct_the_clouds_times() -> None:
    cloud = CloudTimes.guess(1.0, None)
    for _ in range(40):
        cloud.answered(prompt_tokens=100, output_tokens=101, took_s=6.0, decode_s=4.0)
    assert cloud.cost.token_s == pytest.approx(0.04, rel=0.01)

    assert cloud.cost.answer_s(RadioCost(), 100, 101) == pytest.approx(6.0, rel=0.02)


def test_a_tail_is_paid_once_by_those_who_share_it() -> None:
    cloud = CloudTimes.guess(1.0, RADIO)
    first = cloud.sent_j(prompt_tokens=10, output_tokens=10, now_s=5.0)
    second = cloud.sent_j(prompt_tokens=10, output_tokens=10, now_s=5.1)
    assert first is not None
    assert second is not None
    assert first - second == pytest.approx(RADIO.tail_w * 0.4)
    assert cloud.warm(5.5)
    assert not cloud.warm(5.7)


def test_without_numbers_of_the_radio_no_joules_are_claimed() -> None:
    assert CloudTimes.guess(1.0, None).sent_j(prompt_tokens=1, output_tokens=1, now_s=0) is None
    assert radio_of(profile(), None) is None
    assert radio_of(profile(), "moon") is None
    wifi = radio_of(profile(), "wifi")
    assert wifi is not None
    assert wifi.up_byte_j > 0
    cable = radio_of(profile(), "ethernet")
    assert cable is not None
    assert cable.tail_j == cable.up_byte_j == 0


ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"


@pytest.mark.parametrize(
    ("name", "files", "kind"),
    [
        ("wlan0", {"wireless/status": ""}, "wifi"),
        ("wlp3s0", {"phy80211/name": ""}, "wifi"),
        ("wwan0", {"uevent": "DEVTYPE=wwan\n"}, "lte"),
        ("eth0", {"uevent": "INTERFACE=eth0\n"}, "ethernet"),
        ("enp1s0", {"uevent": ""}, "ethernet"),
        ("tun0", {"uevent": ""}, None),
    ],
)
def test_the_kind_of_network_is_that_of_the_default_route(
    tmp_path: Path, name: str, files: dict[str, str], kind: str | None
) -> None:
    for path, text in files.items():
        file = tmp_path / "sys/class/net" / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    table = tmp_path / "proc/net/route"
    table.parent.mkdir(parents=True)
    lines = f"lo\t0000007F\t0\t1\t0\t0\t0\tFF\n{name}\t00000000\t0102A8C0\t3\t0\t0\t100\t00000000\n"
    table.write_text(ROUTE + lines)
    assert network_kind(tmp_path) == kind


@pytest.mark.parametrize("table", ["", "x", ROUTE + "a\t00000000\tb\tc\td\te\tno\tf\n", ROUTE])
def test_a_route_table_of_garbage_is_unknown(tmp_path: Path, table: str) -> None:
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/route").write_text(table)
    assert network_kind(tmp_path) is None
    assert network_kind(tmp_path / "nowhere") is None
