"""How a service's process ends, by name: what whoever started it may rely on."""

from enum import IntEnum


class ServiceExit(IntEnum):
    """Exit codes of `python -m cloud_api` and `python -m worker`."""

    STOPPED = 0  # As asked.
    FAULT = 1  # Start it again.
    SETTINGS = 2  # Settings, or something that they name, cannot be used: it would end so again.
    STALLED = 3  # A worker's stage stood still. Start it again.
