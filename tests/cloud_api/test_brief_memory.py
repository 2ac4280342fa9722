"""Token buckets and nonces: the same promises in this process and in Redis."""

import math
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from cloud_api.brief_memory import BriefMemory, InProcessMemory, Rate, RedisMemory

REDIS = os.environ.get("COTUNE_TEST_REDIS", "redis://127.0.0.1:6379/0")


@pytest.fixture
def prefix() -> str:
    return f"cotune-test-{secrets.token_hex(6)}:"


@pytest.fixture
def redis_memory(prefix: str) -> Iterator[RedisMemory]:
    client = redis.Redis.from_url(REDIS, socket_connect_timeout=1)
    try:
        client.ping()
    except redis.RedisError:
        client.close()
        pytest.skip(f"no Redis answers at {REDIS}")
    memory = RedisMemory(REDIS, prefix)
    yield memory
    memory.close()
    for key in client.scan_iter(f"{prefix}*"):
        client.delete(key)
    client.close()


@pytest.fixture(params=["process", pytest.param("redis", marks=pytest.mark.services)])
def memory(request: pytest.FixtureRequest) -> BriefMemory:
    if request.param == "process":
        return InProcessMemory()
    found: RedisMemory = request.getfixturevalue("redis_memory")
    return found


def test_a_bucket_gives_its_burst_then_its_rate(memory: BriefMemory) -> None:
    rate = Rate(per_second=20, burst=5)
    assert [memory.take("a", rate) for _ in range(5)] == [0] * 5
    wait = memory.take("a", rate)
    assert 0 < wait <= 1 / 20
    assert memory.take("a", rate, cost=0) > 0  # A look at an empty bucket.
    assert memory.take("b", rate) == 0  # Another one's.
    time.sleep(wait + 0.005)
    assert memory.take("a", rate, cost=0) == 0
    assert memory.take("a", rate) == 0
    assert memory.take("a", rate) > 0


def test_a_bucket_gives_no_more_to_many_at_once(memory: BriefMemory) -> None:
    rate = Rate(per_second=0.001, burst=20)
    with ThreadPoolExecutor(8) as threads:
        waits = list(threads.map(lambda _: memory.take("a", rate), range(100)))
    assert waits.count(0) == 20


def test_a_nonce_is_new_once(memory: BriefMemory) -> None:
    with ThreadPoolExecutor(8) as threads:
        first = list(threads.map(lambda _: memory.first_time("dev", "n", 100, 60), range(40)))
    assert first.count(True) == 1
    assert memory.first_time("dev", "m", 100, 60)
    assert memory.first_time("other", "n", 100, 60)


@given(st.lists(st.floats(0, 2), max_size=60), st.floats(0.1, 50), st.integers(1, 20))
def test_no_window_of_time_gets_more_than_the_burst_and_its_rate(
    pauses: list[float], per_second: float, burst: int
) -> None:
    now = 0.0
    memory = InProcessMemory(lambda: now)
    taken = []
    for pause in pauses:
        now += pause
        if memory.take("a", Rate(per_second, burst)) == 0:
            taken.append(now)
    for first, start in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - start) * per_second + 1e-6


def test_this_process_keeps_so_much_and_lets_no_forgotten_nonce_in_again() -> None:
    now = 0.0
    memory = InProcessMemory(lambda: now, most_kept=3)
    assert all(memory.first_time("dev", f"n{number}", 100 + number, 60) for number in range(5))
    for number in range(5):
        assert not memory.first_time("dev", f"n{number}", 100 + number, 60), "forgotten, and taken again"
    assert not memory.first_time("dev", "new", 101, 60)  # As old as what was forgotten: it cannot be told from it.
    assert memory.first_time("dev", "newer", 105, 60)
    assert memory.first_time("other", "new", 1, 60)  # One that asks much costs no other anything.
    for number in range(10):
        memory.take(f"b{number}", Rate(1, 1))
    assert memory.take("b9", Rate(1, 1)) > 0
    now = 100.0
    assert memory.first_time("dev", "n4", 104, 60)  # Its time is over: the signature's age refuses it, not its nonce.


def test_without_redis_a_process_goes_on_by_itself() -> None:
    memory = RedisMemory("redis://127.0.0.1:1/0", "nobody:")
    begun = time.monotonic()
    rate = Rate(0.001, 2)
    assert [memory.take("a", rate) == 0 for _ in range(3)] == [True, True, False]
    assert [memory.first_time("dev", "n", 1, 60) for _ in range(2)] == [True, False]
    assert time.monotonic() - begun < 3
    memory.close()


@pytest.mark.services
def test_processes_share_what_redis_keeps(redis_memory: RedisMemory, prefix: str) -> None:
    other = RedisMemory(REDIS, prefix)
    assert redis_memory.first_time("dev", "n", 1, 60)
    assert not other.first_time("dev", "n", 1, 60)
    rate = Rate(0.001, 3)
    both = (redis_memory, other)
    assert [both[number % 2].take("a", rate) == 0 for number in range(4)] == [True, True, True, False]
    other.close()
    client = redis.Redis.from_url(REDIS)
    assert all(0 < client.ttl(key) <= math.ceil(3 / 0.001) + 1 for key in client.scan_iter(f"{prefix}*"))
    client.close()
