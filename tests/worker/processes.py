"""The worker's two processes as the operating system sees them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from worker.settings import Settings

Answer = TypeVar("Answer")


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables from which `Settings.from_environment` makes `settings` again."""
    return {
        "COTUNE_HOME": str(settings.home),
        "COTUNE_DATABASE_URL": settings.database_url,
        "COTUNE_BROKER_URL": settings.broker_url,
        "COTUNE_QUEUE_PREFIX": settings.queue_prefix,
        "COTUNE_BLOBS": str(settings.blobs),
        "COTUNE_LEASE_SECONDS": str(settings.lease_seconds),
        "COTUNE_SWEEP_SECONDS": str(settings.sweep_seconds),
        "COTUNE_RESEND_AFTER_SECONDS": str(settings.resend_after_seconds),
        "COTUNE_STALL_SECONDS": str(settings.stall_seconds),
        "COTUNE_LONG_CALL_SECONDS": str(settings.long_call_seconds),
        "COTUNE_TORCH_THREADS": "1",
    }


class Processes:
    """Starts trainers and controllers, and ends them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._living: list[subprocess.Popen[bytes]] = []
        self.log = settings.home / "processes.log"

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """`python -m worker <arguments>`; `environment` is added to the settings."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker", *arguments],
                env={**os.environ, **environment_of(self._settings), **(environment or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._living.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """kill -9: no handler runs."""
        process.kill()
        process.wait()
        self._living.remove(process)

    def ended(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit code of one that ended by itself; None while it lives."""
        if process.poll() is not None and process in self._living:
            self._living.remove(process)
        return process.returncode

    def stop(self) -> None:
        """SIGTERM to all; each must end with exit code 0 within ten seconds."""
        for process in self._living:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        codes = []
        for process in self._living:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        self._living = []
        assert set(codes) <= {0}, f"exit codes {codes}; {self.tail()}"

    def kill_all(self) -> None:
        """For the end of a test that failed before it stopped them."""
        for process in list(self._living):
            self.kill(process)

    def tail(self) -> str:
        return "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-40:]) if self.log.exists() else ""

    def wait_for(self, what: str, look: Callable[[], Answer | None], seconds: float = 90) -> Answer:
        """Poll until `look` answers something true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if answer := look():
                return answer
            time.sleep(0.02)
        raise AssertionError(f"{what}: not within {seconds} s; {self.tail()}")
