"""Replaces this device's credential, so that one that leaked unnoticed is worth nothing after a while.

A kill at any point loses nothing: the server keeps the present credential until the new one is used, and the new one is
used only once it is on disk.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from edge_agent.client import CloudClient
from edge_agent.errors import CloudRefused, NotAuthorised
from edge_agent.settings import CREDENTIAL_FILE, write_credential

AGAIN_AFTER = timedelta(days=1)
"""A server that will not replace credentials is asked again so much later."""

log = structlog.get_logger(__name__)


class CredentialRotation:
    """Knows how old the credential is, by the time of its file."""

    def __init__(self, home: Path, client: CloudClient, days: int, now: Callable[[], datetime]) -> None:
        """`days` old it is replaced; 0: never by itself."""
        self._home = home
        self._client = client
        self._days = days
        self._now = now
        self._not_before: datetime | None = None

    def when_due(self) -> None:
        """Replace the credential if it is old enough.

        Raises:
            CloudUnavailable: no answer; the present one stays good.
            NotAuthorised: the server does not accept this device.
        """
        now = self._now()
        if not self._days or (self._not_before is not None and now < self._not_before):
            return
        made = datetime.fromtimestamp((self._home / CREDENTIAL_FILE).stat().st_mtime, now.tzinfo)
        if now - made < timedelta(days=self._days):
            return
        try:
            self.rotate()
        except NotAuthorised:
            raise
        except CloudRefused as error:
            self._not_before = now + AGAIN_AFTER
            log.warning("credential_not_replaced", error=str(error))

    def rotate(self) -> None:
        """Get a new credential, store it, and use it, which voids the one before.

        Raises:
            CloudError: it was not replaced, or not yet; whichever is on disk is good.
        """
        replacement = self._client.replace_credential()
        write_credential(self._home, replacement.credential)
        self._client.use_credential(replacement.credential)
        self._client.whoami()
        log.info("credential_replaced")
