"""What the control groups of Linux (containers, systemd units) leave of the machine's memory.

The machine's own numbers know nothing of them: in a container of 4 GiB on a machine of 64 GiB, 60 may be "available"
until the kernel kills the process. Limits hold for a group with everything below it, so a process has the least of what
its own group and those above leave. Read from `/proc` and the mounted file systems, as described in the kernel's
`admin-guide/cgroup-v2` and `admin-guide/cgroup-v1/memory`; where there are none, nothing is limited.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class _Hierarchy:
    """The files of one version of control groups."""

    filesystem: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_V1 = _Hierarchy("cgroup", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Hierarchy("cgroup2", ("memory.max", "memory.high"), "memory.current", "inactive_file")
"""Above `memory.high` nothing is killed, but the kernel slows the process down to a halt."""


def memory_left(process: Path = PROCESS) -> int | None:
    """Bytes that this process can still take before a control group's limit; None without any.

    Files that were read and are not in use any more count as free: the kernel gives them up first.

    Args:
        process: the process's folder in `/proc`.
    """
    left = [
        room
        for hierarchy, group, top in _groups(process)
        for folder in (group, *group.parents)
        if folder.is_relative_to(top)
        for room in _room(folder, hierarchy)
    ]
    return max(0, min(left)) if left else None


def _groups(process: Path) -> Iterator[tuple[_Hierarchy, Path, Path]]:
    """The folder of the process's group in every hierarchy that counts memory, and where that hierarchy is mounted."""
    paths: dict[str, str] = {}
    for line in _lines(process / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), group)  # version 2 names no controllers
    for line in _lines(process / "mountinfo"):
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split() or ("", "")
        hierarchy, controller = (_V2, "") if kind == _V2.filesystem else (_V1, "memory")
        if kind != hierarchy.filesystem or controller not in ("", *options.split(",")) or controller not in paths:
            continue
        root, mounted = (_unescaped(field) for field in before.split()[3:5])
        # In a container the group's own folder may be what is mounted, under the path that it has outside.
        path = PurePosixPath(paths[controller])
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        yield hierarchy, Path(mounted) / inside, Path(mounted)


def _room(folder: Path, hierarchy: _Hierarchy) -> Iterator[int]:
    """What each limit of a group leaves."""
    limits = [int(text) for name in hierarchy.limits for text in _lines(folder / name) if text.isdecimal()]
    usage = [int(text) for text in _lines(folder / hierarchy.usage) if text.isdecimal()]
    if limits and usage:
        counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
        yield min(limits) - usage[0] + min(usage[0], int(counts.get(hierarchy.reclaimable, 0)))


def _lines(file: Path) -> list[str]:
    """A file's lines; none where it is missing or must not be read."""
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _unescaped(field: str) -> str:
    """A path as `mountinfo` writes it: white space and backslashes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
