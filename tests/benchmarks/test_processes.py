import subprocess
import sys
import time

import pytest

from benchmarks.processes import Seen, Tree, Usage, interpolated

BURN = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"


def seen(parent: int, cpu_seconds: float, started: int = 1) -> Seen:
    return Seen(parent, started, cpu_seconds, 10)


def test_a_tree_is_its_roots_and_all_that_descends_from_them() -> None:
    tree = Tree([2])
    machine = {1: seen(0, 100), 2: seen(1, 1), 3: seen(2, 2), 4: seen(3, 4), 5: seen(1, 50)}
    assert tree.update(machine) == (7, 30)


def test_a_child_that_was_waited_for_counts_once() -> None:
    tree = Tree([2])
    tree.update({2: seen(1, 1), 3: seen(2, 4)})
    assert tree.update({2: seen(1, 1 + 4.5)}) == (5.5, 10)


def test_a_child_of_an_ended_child_was_told_to_the_one_who_waited() -> None:
    tree = Tree([2])
    tree.update({2: seen(1, 1), 3: seen(2, 2), 4: seen(3, 4)})
    assert tree.update({2: seen(1, 1 + 2 + 4)}) == (7, 10)


def test_an_orphan_is_followed_and_kept_as_it_was_seen_last() -> None:
    tree = Tree([2])
    tree.update({2: seen(1, 1), 3: seen(2, 2), 4: seen(3, 4)})
    tree.update({2: seen(1, 3), 4: seen(1, 5)})  # 3 has ended; 4 belongs to the machine's first process now
    assert tree.update({2: seen(1, 3), 4: seen(1, 6)}) == (9, 20)
    assert tree.update({2: seen(1, 3)}) == (9, 10)


def test_another_process_with_an_old_id_is_another_process() -> None:
    tree = Tree([2])
    tree.update({2: seen(1, 1), 3: seen(2, 2)})
    assert tree.update({2: seen(1, 3), 3: seen(1, 70, started=9)}) == (3, 10)


def test_an_ended_root_is_kept() -> None:
    tree = Tree([2, 3])
    tree.update({2: seen(1, 1), 3: seen(1, 2)})
    assert tree.update({3: seen(1, 5)}) == (6, 10)


def test_between_two_samples_lies_a_straight_line() -> None:
    samples = [(10.0, 1.0), (12.0, 2.0), (13.0, 5.0)]
    assert interpolated(samples, 11.0) == 1.5
    assert interpolated(samples, 12.5) == 3.5
    with pytest.raises(ValueError, match=r"expected a moment from 10.0 to 13.0, got 13.5"):
        interpolated(samples, 13.5)


def test_real_processes_are_measured_with_their_ended_children() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{BURN.format(0.4)}''']); input()"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with Usage({"parent": [process.pid]}) as usage:
            started = time.time()
            deadline = time.monotonic() + 60
            while usage.cpu_seconds("parent", started, time_of_a_look(usage)) < 0.4 and time.monotonic() < deadline:
                time.sleep(0.05)
            spent = usage.cpu_seconds("parent", started, time_of_a_look(usage))
        process.communicate(b"\n")
    assert 0.4 <= spent < 5
    assert usage.most_bytes("parent") > 2**20


def time_of_a_look(usage: Usage) -> float:
    now = time.time()
    usage.take()
    return now
