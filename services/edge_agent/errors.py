"""Everything that can go wrong on a device, as one tree.

AgentError
├── ConfigurationError      what the owner has to mend, all of it at once
├── AlreadyRunning          another process holds the home folder
├── AlreadyEnrolled         this home folder has an identity
├── Stopped                 a signal asked the process to end
├── Cancelled               the server no longer wants this assignment
├── CannotTrain             this device cannot do this assignment; the server is told why
├── UnknownStrategy         nor one of a strategy, or with a setting of it, that is not known here
└── CloudError
    ├── CloudUnavailable    no answer, or one that means "later": try again
    └── CloudRefused        a definite no, with the server's error code
        └── NotAuthorised   the credential is unknown, void or of the wrong kind
"""

from edge_agent.exit_codes import ExitCode
from protocol.assignments import AssignmentName


class AgentError(Exception):
    """Base of the tree; `exit_code` is what the process ends with if nothing handles it."""

    exit_code = ExitCode.FAILURE


class ConfigurationError(AgentError):
    """One or more settings, files or folders are wrong."""

    exit_code = ExitCode.BAD_CONFIGURATION

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class AlreadyRunning(AgentError):
    """The lock of the home folder is held."""

    exit_code = ExitCode.ALREADY_RUNNING


class AlreadyEnrolled(AgentError):
    """The home folder holds an identity, which never changes."""

    exit_code = ExitCode.ALREADY_ENROLLED


class Stopped(AgentError):
    """The stop event was set; unwinds whatever is going on. What matters is on disk already."""

    exit_code = ExitCode.OK


class Cancelled(AgentError):
    """The round closed or the run ended while this device was training for it."""


class CannotTrain(AgentError):
    """This assignment is beyond this device.

    Attributes:
        code: an `ErrorCode` or the device's own word, at most 64 characters.
        reason: for the operator, at most 400 characters; never data text.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code[:64]
        self.reason = reason[:400] or code


class UnknownStrategy(AgentError):
    """An assignment asks for a strategy, or for a setting of one, that this installation does not know.

    Attributes:
        assignment: which one.
        reason: what of it is unknown.
    """

    def __init__(self, assignment: AssignmentName, reason: str) -> None:
        super().__init__(reason)
        self.assignment = assignment
        self.reason = f"this device's Cotune does not know it, or has not got it installed: {reason}"


class CloudError(AgentError):
    """Base of what a call to the cloud can end in."""

    exit_code = ExitCode.CONNECTION_OR_AUTHORISATION


class CloudUnavailable(CloudError):
    """No answer, a broken one, or one that means "later" (408, 425, 429, 5xx, not yet approved, the clock).

    Attributes:
        retry_after_seconds: what the server asked for, if it did.
        progressed: some bytes of a download were kept before it broke, so the next try starts further on.
    """

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, progressed: bool = False) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.progressed = progressed


class CloudRefused(CloudError):
    """The server understood and said no.

    Attributes:
        code: the problem's `code`, as text: a newer server may know codes that this agent does not.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{detail} ({code}, HTTP {status})")
        self.status = status
        self.code = code
        self.detail = detail


class NotAuthorised(CloudRefused):
    """401, or 403 for good: the credential is not accepted, and asking again will not help."""
