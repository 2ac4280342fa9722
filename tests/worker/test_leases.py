"""The lease: kept while it can be, given up when it is lost or the process stops."""

import threading
import time

import pytest

from worker.leases import Abandoned, Lease


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
