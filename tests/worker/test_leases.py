"""The lease: kept while it can be, given up when it is lost or the process stops."""

import math
import re
import threading
import time

import pytest

from worker.leases import Abandoned, Lease, Silence


def _wait_until_lost(lease: Lease, seconds: float) -> float:
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        try:
            lease.check()
        except Abandoned:
            return time.monotonic() - start
        time.sleep(0.005)
    return seconds


def test_it_is_renewed_until_the_block_ends() -> None:
    renewed = 0

    def renew() -> bool:
        nonlocal renewed
        renewed += 1
        return True

    with Lease(renew, 0.2, threading.Event()) as lease:
        assert _wait_until_lost(lease, 0.5) == 0.5
    count = renewed
    assert count >= 2
    time.sleep(0.2)
    assert renewed == count


def test_refused_renewal_ends_the_work() -> None:
    with Lease(lambda: False, 0.2, threading.Event()) as lease:
        lease.check()
        assert _wait_until_lost(lease, 10) < 10
        with pytest.raises(Abandoned, match="lease is lost"):
            lease.on_progress("distillation", 1, 10, {"ce": 1.0})


def test_a_database_that_is_away_costs_the_lease_only_after_its_time() -> None:
    def renew() -> bool:
        raise ConnectionError("away")

    with Lease(renew, 0.4, threading.Event()) as lease:
        assert 0.3 < _wait_until_lost(lease, 10) < 10


def test_stop_ends_the_work_at_once() -> None:
    stop = threading.Event()
    with Lease(lambda: True, 20, stop) as lease:
        lease.check()
        stop.set()
        with pytest.raises(Abandoned, match="stops"):
            lease.check()


@pytest.mark.parametrize("in_long_call", [False, True])
def test_a_stage_that_is_silent_loses_its_lease_and_is_told_why(*, in_long_call: bool) -> None:
    told: list[str] = []
    ended = threading.Event()
    renewals: list[float] = []

    def renew() -> bool:
        renewals.append(time.monotonic())
        return True

    def stalled(reason: str) -> None:
        told.append(reason)
        ended.set()

    silence = Silence(step_seconds=0.2, long_call_seconds=0.6, on_stall=stalled)
    with Lease(renew, 0.2, threading.Event(), silence) as lease:
        start = time.monotonic()
        if in_long_call:
            with lease.long_call("loading"):
                assert ended.wait(60)
        else:
            lease.on_progress("distillation", 3, 10, {})
            assert ended.wait(60)
        least = 0.6 if in_long_call else 0.2
        assert time.monotonic() - start >= least
        assert all(each - start < least + 0.2 for each in renewals), "no renewal of a lease that stands still"
        with pytest.raises(Abandoned, match="lease is lost"):
            lease.check()
    named = r"\(loading\), at most 0.6 s" if in_long_call else r"\(distillation, 3 of 10\), at most 0.2 s"
    assert re.fullmatch(f"no progress for \\d+ s {named}", told.pop())
    assert told == []


def test_each_mark_renews_the_patience_and_is_passed_on() -> None:
    promised: list[float] = []
    silence = Silence(step_seconds=50.0, long_call_seconds=100.0, promise=promised.append)
    with Lease(lambda: True, 20, threading.Event(), silence) as lease:
        lease.check()
        with lease.long_call("making the proxy"):
            lease.check()
            lease.on_progress("distillation", 1, 2, {})
        lease.check()
    # entered, check, the long call's own check, the long call, check in it, progress (check, mark), its end, check
    assert promised == [50.0, 50.0, 50.0, 100.0, 100.0, 100.0, 50.0, 50.0, 50.0, math.inf]
