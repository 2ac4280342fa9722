"""How `cotune` ends, by name. Scripts may switch on these numbers."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `cotune`."""

    OK = 0  # Done.
    RUN_FAILED = 1  # The run failed or was stopped, or a process of ours could not be kept alive.
    CONNECTION_OR_AUTHORISATION = 2  # The API does not answer, or does not accept the key.
    TIMED_OUT = 3  # The time given with `--timeout` is over.
    BAD_INPUT = 4  # The command line, a file, a folder or a port; or the API refused what was asked.
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; everything that was started has ended.
