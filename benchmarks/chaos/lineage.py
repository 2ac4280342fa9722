"""Which version each round must have started from, what a rollback withdraws, and what a paused run must not do."""

from benchmarks.chaos.history import History
from protocol.events import Event, EventType
from protocol.statuses import RoundStatus, RunStatus


def violations(history: History) -> list[str]:
    """Return what the events and rows of a run say that must not be; nothing if all is well."""
    return [*_bases(history), *_paused(history)]


def _bases(history: History) -> list[str]:
    """Each round starts from the newest version that was promoted and not withdrawn when it opened."""
    found: list[str] = []
    usable: list[int] = []
    withdrawn: set[int] = set()
    opened: dict[str | None, int] = {}
    for event in history.events:
        match event.type:
            case EventType.VERSION_CREATED if event.data["promoted"]:
                usable.append(event.data["number"])
            case EventType.RUN_ROLLED_BACK:
                found += _rolled_back(event, usable)
                withdrawn |= {number for number in usable if number > event.data["to"]}
                usable = [number for number in usable if number <= event.data["to"]]
            case EventType.ROUND_OPENED:
                opened[event.round_id] = event.data["base_version"]
                if usable[-1:] != [event.data["base_version"]]:
                    name = f"round {event.data['number']}.{event.data['attempt']}"
                    found.append(f"{name} opened from version {event.data['base_version']}; usable were {usable}")
    return found + _rows(history, opened, withdrawn)


def _rolled_back(event: Event, usable: list[int]) -> list[str]:
    if event.data["to"] in usable and usable[-1] == event.data["from"]:
        return []
    return [f"rolled back from {event.data['from']} to {event.data['to']}; usable were {usable}"]


def _rows(history: History, opened: dict[str | None, int], withdrawn: set[int]) -> list[str]:
    versions = {version.number: version for version in history.versions}
    found = [
        f"version {number} is {'not ' if version.withdrawn_at is None else ''}withdrawn"
        for number, version in versions.items()
        if (version.withdrawn_at is not None) != (number in withdrawn)
    ]
    for row in history.rounds:
        base = versions.get(row.base_version)
        name = f"round {row.number}.{row.attempt}"
        if opened.get(row.id) != row.base_version:
            found.append(f"{name} has base {row.base_version}; it opened from {opened.get(row.id)}")
        if base is not None and row.base_adapter_sha256 != base.proxy_adapter_sha256:
            found.append(f"{name} has adapter {row.base_adapter_sha256}, not that of version {base.number}")
        found += [
            f"version {version.number} has parent {version.parent}; its round started from {row.base_version}"
            for version in history.versions
            if version.round_id == row.id and version.parent != row.base_version
        ]
    return found


def _paused(history: History) -> list[str]:
    """Events come in the order of their commits, so what stands between a pause and its end happened in between."""
    found: list[str] = []
    paused = False
    for event in history.events:
        if event.type is EventType.RUN_STATUS_CHANGED:
            paused = event.data["to"] == RunStatus.PAUSED.value
        elif paused and event.type is EventType.ROUND_OPENED:
            found.append(f"paused, the run opened round {event.data['number']}.{event.data['attempt']}")
        elif paused and _closes(event):
            found.append(f"paused, the run closed round {event.data['number']}")
    return found


def _closes(event: Event) -> bool:
    return event.type is EventType.ROUND_STATUS_CHANGED and event.data["to"] == RoundStatus.AGGREGATING.value
