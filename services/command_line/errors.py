"""What can go wrong at the command line, each with the exit code it ends in and what to do next.

CommandError
├── Unreachable     no answer, or not that of a Cotune API
├── NotAuthorised   no key, or one that the API does not accept
├── Refused         the API understood and said no
├── RunFailed       the run ended, but not as completed
├── TimedOut        the time given is over
├── ProcessFailed   a process that we started does not stay alive
├── Contaminated    text to train on holds rows that are kept for devices or for testing
└── BadInput        a file, a folder, a port or an option
"""

from command_line.exit_codes import ExitCode


class CommandError(Exception):
    """Base: one line of what happened, and optionally one line of what to do next."""

    exit_code = ExitCode.RUN_FAILED

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step


class Unreachable(CommandError):
    """The API does not answer, or not as a Cotune API."""

    exit_code = ExitCode.CONNECTION_OR_AUTHORISATION


class NotAuthorised(CommandError):
    """There is no operator key, or the API does not accept it."""

    exit_code = ExitCode.CONNECTION_OR_AUTHORISATION


class Refused(CommandError):
    """The API understood the request and refused it."""

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, message: str, *, code: str, next_step: str | None = None) -> None:
        super().__init__(message, next_step=next_step)
        self.code = code


class RunFailed(CommandError):
    """The run ended, but not as completed."""

    exit_code = ExitCode.RUN_FAILED


class TimedOut(CommandError):
    """What was waited for did not happen in the time given."""

    exit_code = ExitCode.TIMED_OUT


class ProcessFailed(CommandError):
    """A process that we started does not stay alive."""

    exit_code = ExitCode.RUN_FAILED


class Contaminated(CommandError):
    """Text to train on holds rows that are kept for devices or for testing."""

    exit_code = ExitCode.RUN_FAILED


class BadInput(CommandError):
    """Something that the caller gave is wrong: a file, a folder, a port, an option."""

    exit_code = ExitCode.BAD_INPUT
