"""Answers "nothing for you" without the database, which most polls are answered with.

A picture of the open work and of who has polled lately, kept in this process and renewed by the feed: as soon as
something was committed that offers work, and every few seconds in any case. It only ever says no; whoever it does not
say no to is looked at in the database. So what it can get wrong is a moment's delay: a device polls again, or is woken.

A credential that was good a moment ago is trusted for such an answer, which tells nothing, until the feed says that the
device's status has changed, or `trusted_seconds` are over. Work is only given after a look at the database.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from persistence.enrolment import DeviceIdentity
from persistence.identifiers import sha256_text
from persistence.open_work import OpenWork
from protocol.events import Event, EventType

log = structlog.get_logger(__name__)

MOST_DEVICES = 100_000
"""So many are remembered; those that polled longest ago are forgotten first."""

RENEWED_SECONDS = 5.0
"""So old, the picture is renewed though nothing was heard; so often, what was seen of devices is written down."""


@dataclass
class _Known:
    identity: DeviceIdentity
    until: float


class WorkBoard:
    """What this process knows of the open work and of the devices.

    Args:
        look: reads the open work.
        touch: writes down that devices were seen.
        trusted_seconds: how long a credential is trusted for being told that there is nothing; 0: the database is asked
            each time.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[OpenWork]],
        touch: Callable[[Sequence[str]], Awaitable[None]],
        *,
        trusted_seconds: float,
    ) -> None:
        self._look = look
        self._touch = touch
        self._trusted_seconds = trusted_seconds
        self._work: OpenWork | None = None
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._credential_of: dict[str, str] = {}
        self._seen: set[str] = set()
        self._renewed_at = float("-inf")

    def has_nothing_for(self, device_id: str) -> bool:
        """Return whether there surely is no work for the device. Without a picture nothing is sure."""
        return self._work is not None and not self._work.may_concern(device_id)

    def remember(self, bearer: str, identity: DeviceIdentity) -> None:
        """Trust the credential for a while: the database has just said whose it is."""
        self.forget(identity.device_id)
        if identity.next_credential_sha256 is not None:
            return  # its first use has a meaning, see `enrolment.adopt_credential`
        key = sha256_text(bearer)
        self._known[key] = _Known(identity, time.monotonic() + self._trusted_seconds)
        self._credential_of[identity.device_id] = key
        if len(self._known) > MOST_DEVICES:
            _, oldest = self._known.popitem(last=False)
            self._credential_of.pop(oldest.identity.device_id, None)

    def recall(self, bearer: str | None) -> DeviceIdentity | None:
        """Return whose credential it is; None: ask the database."""
        known = self._known.get(sha256_text(bearer)) if bearer is not None else None
        return known.identity if known is not None and known.until > time.monotonic() else None

    def saw(self, device_id: str) -> None:
        """A device polled and the database was not asked: it is told later, of many at once."""
        self._seen.add(device_id)

    def forget(self, device_id: str) -> None:
        """Trust nothing of a device any more."""
        key = self._credential_of.pop(device_id, None)
        if key is not None:
            self._known.pop(key, None)

    async def advance(self, events: Sequence[Event], *, offers_work: bool) -> None:
        """Take in what was committed; called by the feed before it wakes anybody.

        Args:
            offers_work: some of the events may mean work for somebody.
        """
        for event in events:
            if event.type is EventType.DEVICE_STATUS_CHANGED and event.device_id is not None:
                self.forget(event.device_id)
        now = time.monotonic()
        if offers_work or self._work is None or now - self._renewed_at >= RENEWED_SECONDS:
            self._work = await self._look()
            self._renewed_at = now

    async def write_down(self) -> None:
        """Write down who was seen, every few seconds until this is cancelled.

        Apart from `advance`: thousands of devices take a while, and nobody who has work has to wait for that.
        """
        while True:
            await asyncio.sleep(RENEWED_SECONDS)
            seen, self._seen = self._seen, set()
            try:
                if seen:
                    await self._touch(sorted(seen))
            except Exception as error:  # a database that is away: they are told of once it is back
                log.warning("devices_not_touched", reason=str(error), devices=len(seen))
                self._seen |= seen

    def lose(self) -> None:
        """Nothing is heard from the database: every question goes there, and is answered as that can."""
        self._work = None
