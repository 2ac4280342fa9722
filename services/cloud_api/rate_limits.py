"""How much one address, one device and one who fails may ask. Too much is 429 with `Retry-After`; nothing is queued."""

import math

from starlette.types import ASGIApp, Receive, Scope, Send

from cloud_api.brief_memory import BriefMemory, Rate
from cloud_api.problems import problem_response
from cloud_api.security import Rates
from cloud_api.threads import in_thread
from protocol.errors import DomainError, ErrorCode

PROBES = frozenset({"/health", "/ready"})
"""Never limited: who watches the service must not be told that it is dead because somebody else is busy."""


class RateLimited(DomainError):
    """Too many requests; `headers` say when one will be answered again."""

    def __init__(self, who: str, wait_seconds: float) -> None:
        super().__init__(ErrorCode.RATE_LIMITED, f"too many requests of {who}; try again in {wait_seconds:.1f} s")
        self.headers = {"Retry-After": str(max(math.ceil(wait_seconds), 1))}


class RateLimits:
    """The limits of this service. A method raises `RateLimited` or returns."""

    def __init__(self, memory: BriefMemory, rates: Rates) -> None:
        self.waits = memory.waits
        self._memory = memory
        self._rates = rates

    def address(self, address: str) -> None:
        """Count a request of an address."""
        self._take(f"address:{address}", self._rates.address, "this address")

    def device(self, device_id: str) -> None:
        """Count a request of a device that has proved who it is: nobody else can use up what it may ask."""
        self._take(f"device:{device_id}", self._rates.device, f"device {device_id}")

    def enrolment(self, address: str) -> None:
        """Count an enrolment from an address, also one that fails."""
        self._take(f"enrolment:{address}", self._rates.enrolment, "this address to enrol")

    def before_authentication(self, address: str, bearer: str) -> None:
        """Refuse to look at a credential where too many wrong ones came from."""
        self._take(_failures(address, bearer), self._rates.failure, "this address with a wrong credential", cost=0)

    def failed_authentication(self, address: str, bearer: str) -> None:
        """Count a wrong credential. It was refused already, so this raises nothing."""
        self._memory.take(_failures(address, bearer), self._rates.failure)

    def _take(self, key: str, rate: Rate, who: str, cost: int = 1) -> None:
        wait_seconds = self._memory.take(key, rate, cost)
        if wait_seconds > 0:
            raise RateLimited(who, wait_seconds)


def _failures(address: str, bearer: str) -> str:
    """A device that keeps a void credential locks out itself, not everybody behind its address."""
    claimed, dot, _ = bearer.partition(".")
    return f"failure:{address}:{claimed[:64] if dot and claimed.isascii() else ''}"


class AddressLimit:
    """ASGI middleware: counts every request but the probes' by its address, before anything else is done for it."""

    def __init__(self, app: ASGIApp, limits: RateLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            address = (scope.get("client") or ("unknown",))[0]
            try:
                if self._limits.waits:
                    await in_thread(self._limits.address, address)
                else:
                    self._limits.address(address)
            except RateLimited as error:
                request_id = scope.get("cotune_request_id")
                response = problem_response(error.code, error.detail, request_id=request_id, headers=error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
