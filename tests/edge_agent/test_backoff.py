"""Back-off: bounds, jitter, Retry-After, and that nothing sleeps for real."""

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.backoff import Backoff, Retrier
from edge_agent.errors import CloudRefused, CloudUnavailable, Stopped

HINTS = st.lists(st.none() | st.floats(0, 3600), min_size=1, max_size=200)


@given(seed=st.integers(), base=st.floats(0.01, 10), cap=st.floats(0.01, 600), hints=HINTS)
def test_every_delay_lies_between_the_servers_wish_and_the_bound_above_it(
    seed: int, base: float, cap: float, hints: list[float | None]
) -> None:
    backoff = Backoff(random.Random(seed).random, base_seconds=base, cap_seconds=cap)
    for failures, hint in enumerate(hints):
        delay = backoff.next_delay(hint)
        assert (hint or 0) <= delay <= (hint or 0) + min(cap, base * 2.0**failures) * (1 + 1e-9)


def test_the_bound_doubles_to_the_cap_and_a_reset_starts_anew() -> None:
    backoff = Backoff(lambda: 1.0, base_seconds=1, cap_seconds=5)
    assert [backoff.next_delay() for _ in range(4)] == [1, 2, 4, 5]
    backoff.reset()
    assert backoff.next_delay() == 1


def test_a_million_failures_do_not_overflow() -> None:
    backoff = Backoff(lambda: 1.0, cap_seconds=60)
    backoff._failures = 1_000_000
    assert backoff.next_delay() == 60


def test_a_thousand_devices_do_not_come_back_together() -> None:
    """After an outage with the same Retry-After for all, no tenth of the window gets more than a fifth of them."""
    source = random.Random(7)
    arrivals = []
    for _ in range(1000):
        backoff = Backoff(source.random, base_seconds=0.5, cap_seconds=60)
        for _ in range(6):
            backoff.next_delay()
        arrivals.append(backoff.next_delay(10.0))
    width = 0.5 * 2**6
    counts = [sum(10 + width * i / 10 <= one < 10 + width * (i + 1) / 10 for one in arrivals) for i in range(10)]
    assert sum(counts) == 1000
    assert max(counts) < 200


def test_the_retrier_waits_as_told_and_gives_the_answer() -> None:
    waited: list[float] = []
    answers = iter([CloudUnavailable("down"), CloudUnavailable("busy", retry_after_seconds=7), "ok"])

    def action() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    retrier = Retrier(lambda seconds: bool(waited.append(seconds)), lambda: Backoff(lambda: 1.0, base_seconds=1))
    assert retrier.call("test", action) == "ok"
    assert waited == [1, 9]


def test_progress_starts_the_delays_anew() -> None:
    waited: list[float] = []
    left = iter([False, False, True, False, None])

    def action() -> None:
        progressed = next(left)
        if progressed is not None:
            raise CloudUnavailable("cut", progressed=progressed)

    Retrier(lambda seconds: bool(waited.append(seconds)), lambda: Backoff(lambda: 1.0, base_seconds=1)).call(
        "x", action
    )
    assert waited == [1, 2, 1, 2]


def test_a_stop_ends_the_wait_and_a_refusal_is_not_retried() -> None:
    def unavailable() -> None:
        raise CloudUnavailable("down")

    def refused() -> None:
        raise CloudRefused(409, "round_closed", "too late")

    stop = threading.Event()
    stop.set()
    retrier = Retrier(stop.wait, lambda: Backoff(random.random))
    with pytest.raises(Stopped):
        retrier.call("test", unavailable)
    with pytest.raises(CloudRefused, match="too late"):
        retrier.call("test", refused)
