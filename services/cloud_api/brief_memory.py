"""What is remembered for minutes only: how much each caller has asked for, and which nonces were here.

In Redis where the broker is Redis, so that all API processes share it; else in this process, which is whole only as
long as there is one. While Redis does not answer, each process goes on by itself: requests are served, limits hold a
process each, and a replay would have to reach another process, in those minutes, within the signature's window.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog

log = structlog.get_logger(__name__)
Answer = TypeVar("Answer")

MOST_KEPT = 100_000
"""Buckets, and nonces, that one process keeps."""

REDIS_SECONDS = 1.0
"""Longest wait for Redis; and how many seconds it is then left alone, times `PAUSE_FACTOR`."""
PAUSE_FACTOR = 5

TAKE = """
local now = redis.call('TIME'); now = now[1] + now[2] / 1000000
local rate, burst, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = math.min(burst, (tonumber(kept[1]) or burst) + (now - (tonumber(kept[2]) or now)) * rate)
local wait = 0
if tokens < 1 then wait = (1 - tokens) / rate else tokens = tokens - cost end
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', tostring(now))
redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 1)
return tostring(wait)
"""
"""A token bucket in one step: no other process reads between our reading and writing."""


@dataclass(frozen=True)
class Rate:
    """A token bucket: so many requests a second in the long run, and so many at once."""

    per_second: float
    burst: int


class BriefMemory(Protocol):
    """What both memories do. `waits`: whether a call may block; then it belongs into a thread."""

    waits: bool

    def take(self, key: str, rate: Rate, cost: int = 1) -> float:
        """Take `cost` tokens from the bucket `key` and return 0, or return in how many seconds it has one."""
        ...

    def first_time(self, device_id: str, nonce: str, created: int, keep_seconds: int) -> bool:
        """Return whether a device's nonce was not here in the last `keep_seconds`, and remember it.

        Args:
            created: when the request was signed, seconds since 1970.
        """
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class InProcessMemory:
    """Bounded: forgets the bucket that was longest not used (it is full again by then), never a nonce that counts."""

    waits = False

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, most_kept: int = MOST_KEPT) -> None:
        self._clock = clock
        self._most_kept = most_kept
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._nonces: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()
        self._forgotten: dict[str, int] = {}
        """Device -> when the newest request was signed whose nonce is no longer known."""
        self._lock = threading.Lock()

    def take(self, key: str, rate: Rate, cost: int = 1) -> float:
        """As `BriefMemory`."""
        with self._lock:
            now = self._clock()
            tokens, at = self._buckets.pop(key, (float(rate.burst), now))
            tokens = min(float(rate.burst), tokens + (now - at) * rate.per_second)
            wait = (1 - tokens) / rate.per_second if tokens < 1 else 0.0
            self._buckets[key] = (tokens if wait else tokens - cost, now)
            if len(self._buckets) > self._most_kept:
                self._buckets.popitem(last=False)
            return wait

    def first_time(self, device_id: str, nonce: str, created: int, keep_seconds: int) -> bool:
        """As `BriefMemory`. Of a device whose nonce it had to forget early, it takes nothing as old any more."""
        key = (device_id, nonce)
        with self._lock:
            now = self._clock()
            while self._nonces and next(iter(self._nonces.values()))[1] <= now:
                self._nonces.popitem(last=False)
            if key in self._nonces or created <= self._forgotten.get(device_id, -1):
                return False
            self._nonces[key] = (created, now + keep_seconds)
            if len(self._nonces) > self._most_kept:
                (whose, _), (when, _) = self._nonces.popitem(last=False)
                self._forgotten[whose] = max(self._forgotten.get(whose, -1), when)
            return True

    def close(self) -> None:
        """As `BriefMemory`."""


class RedisMemory:
    """Shared by all API processes; falls back on its own memory while Redis does not answer."""

    waits = True

    def __init__(self, url: str, prefix: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        import redis  # slow to load, and not needed when embedded

        self._errors = redis.RedisError
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS, decode_responses=True
        )
        self._script = self._redis.register_script(TAKE)
        self._prefix = f"{prefix}cotune:"
        self._here = InProcessMemory(clock)
        self._clock = clock
        self._left_alone_until = 0.0

    def take(self, key: str, rate: Rate, cost: int = 1) -> float:
        """As `BriefMemory`."""
        arguments = [rate.per_second, rate.burst, cost]
        return self._ask(
            lambda: float(self._script(keys=[f"{self._prefix}bucket:{key}"], args=arguments)),
            lambda: self._here.take(key, rate, cost),
        )

    def first_time(self, device_id: str, nonce: str, created: int, keep_seconds: int) -> bool:
        """As `BriefMemory`. Remembered here as well, so that losing Redis forgets nothing that this process saw."""
        if not self._here.first_time(device_id, nonce, created, keep_seconds):
            return False
        name = f"{self._prefix}nonce:{device_id}:{nonce}"
        return self._ask(lambda: bool(self._redis.set(name, 1, nx=True, ex=keep_seconds)), lambda: True)

    def close(self) -> None:
        """As `BriefMemory`."""
        self._redis.close()

    def _ask(self, question: Callable[[], Answer], otherwise: Callable[[], Answer]) -> Answer:
        if self._clock() < self._left_alone_until:
            return otherwise()
        try:
            return question()
        except self._errors as error:
            self._left_alone_until = self._clock() + PAUSE_FACTOR * REDIS_SECONDS
            log.warning("brief_memory_alone", error=type(error).__name__)
            return otherwise()


def keep_seconds(window_seconds: int) -> int:
    """Return how long a nonce must be remembered: until its request is too old, however far ahead its clock was."""
    return math.ceil(2 * window_seconds) + 1
