"""The least of what a process's control groups leave, read from files as the kernel writes them."""

from pathlib import Path

import psutil
import pytest

from assets.control_groups import memory_left
from assets.devices import available_memory

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712"


class Machine:
    """A `/proc/<pid>` and mounted control groups in a folder."""

    def __init__(self, folder: Path) -> None:
        self.process = folder / "proc"
        self.process.mkdir()
        self.mounted = folder / "sys fs"  # mountinfo escapes white space

    def belongs(self, *lines: str) -> None:
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mounts(self, *lines: str) -> None:
        escaped = str(self.mounted).replace(" ", "\\040")
        text = "".join(f"{line.replace('@', escaped)}\n" for line in lines)
        (self.process / "mountinfo").write_text("22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n" + text)

    def group(self, path: str, **files: object) -> None:
        folder = self.mounted / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_least_of_all_groups_above_counts_in_version_2(machine: Machine) -> None:
    machine.belongs("0::/agent.slice/agent.service")
    machine.mounts("30 23 0:26 / @ rw,nosuid - cgroup2 cgroup2 rw,nsdelegate")
    machine.group("")
    machine.group("agent.slice", memory__max=8 * GIB, memory__current=6 * GIB, memory__stat="anon 5\ninactive_file 0")
    machine.group("agent.slice/agent.service", memory__max="max", memory__current=GIB)
    assert memory_left(machine.process) == 2 * GIB
    machine.group("agent.slice/agent.service", memory__max=2 * GIB, memory__current=GIB)
    assert memory_left(machine.process) == GIB
    machine.group("agent.slice/agent.service", memory__high=GIB + 5)
    assert memory_left(machine.process) == 5, "above memory.high the process hardly runs"
    machine.group("agent.slice/agent.service", memory__current=3 * GIB)
    assert memory_left(machine.process) == 0


def test_files_that_were_read_count_as_free(machine: Machine) -> None:
    machine.belongs("0::/")
    machine.mounts("30 23 0:26 / @ rw - cgroup2 cgroup2 rw")
    machine.group("", memory__max=4 * GIB, memory__current=4 * GIB, memory__stat=f"anon 1\ninactive_file {3 * GIB}")
    assert memory_left(machine.process) == 3 * GIB


def test_a_container_of_version_1_sees_its_own_folder_as_the_top(machine: Machine) -> None:
    machine.belongs("9:name=systemd:/docker/ab", "4:memory:/docker/ab", "1:cpu,cpuacct:/docker/ab", "0::/docker/ab")
    machine.mounts(
        "31 30 0:27 /docker/ab @/cpu ro - cgroup cgroup rw,cpu,cpuacct",
        "35 30 0:32 /docker/ab @/memory ro - cgroup cgroup rw,memory",
        "38 30 0:38 /docker/ab @/unified ro - cgroup2 cgroup2 rw",
    )
    limits = {"memory__limit_in_bytes": 3 * GIB, "memory__usage_in_bytes": 2 * GIB}
    machine.group("memory", **limits, memory__stat=f"inactive_file 7\ntotal_inactive_file {GIB // 2}")
    machine.group("unified")
    assert memory_left(machine.process) == 3 * GIB // 2


def test_a_path_that_is_not_there_is_taken_for_the_top(machine: Machine) -> None:
    machine.belongs("4:memory:/docker/ab")
    machine.mounts("35 30 0:32 /other @ ro - cgroup cgroup rw,memory")
    machine.group("", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=GIB)
    assert memory_left(machine.process) == 2 * GIB


def test_no_limit_is_none(machine: Machine) -> None:
    assert memory_left(machine.process) is None, "no Linux"
    machine.belongs("0::/x")
    machine.mounts()
    assert memory_left(machine.process) is None, "nothing is mounted"
    machine.mounts("30 23 0:26 / @ rw - cgroup2 cgroup2 rw", "31 1 0:1 / @ rw - cgroup cgroup rw,cpu")
    machine.group("x", memory__max="max", memory__high="max", memory__current=GIB)
    assert memory_left(machine.process) is None


def test_available_memory_is_the_least_of_machine_and_limits_and_what_is_ours(machine: Machine) -> None:
    machine.belongs("0::/", "4:memory:/")
    machine.mounts("30 23 0:26 / @ rw - cgroup2 cgroup2 rw", "31 23 0:27 / @/v1 rw - cgroup cgroup rw,memory")
    ours = psutil.Process().memory_info().rss
    machine.group("", memory__max=8_000_000, memory__current=5_000_000)
    assert available_memory("cpu", machine.process)["cpu"] == pytest.approx(3_000_000 + ours, abs=50_000_000)
    machine.group("", memory__max="max")
    machine.group("v1", memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=5_000_000)
    unlimited = psutil.virtual_memory().available + ours
    assert available_memory("cpu", machine.process)["cpu"] == pytest.approx(unlimited, rel=0.3)
