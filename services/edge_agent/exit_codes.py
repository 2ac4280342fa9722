"""How the process ends, by name. Service managers and scripts may switch on these numbers."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `cotune-agent`."""

    OK = 0  # Done, or stopped because somebody asked for it.
    FAILURE = 1  # A fault of the agent itself; the log holds the traceback.
    CONNECTION_OR_AUTHORISATION = 2  # The cloud could not be reached, or does not accept this device.
    TIMED_OUT = 3  # `run-once`: no work came in the time given.
    BAD_CONFIGURATION = 4  # Command line, agent.toml, credential, model folder or data file; all problems are listed.
    ALREADY_RUNNING = 5  # Another agent holds this home folder.
    ALREADY_ENROLLED = 6  # This home folder already has an identity.
