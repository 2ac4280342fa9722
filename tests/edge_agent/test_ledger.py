"""The ledger survives a torn line and concurrent writers."""

import threading
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.ledger import Ledger, Purpose


def now() -> datetime:
    return datetime(2026, 1, 2, tzinfo=UTC)


def test_entries_come_back_in_order_and_add_up(ledger: Ledger) -> None:
    ledger.record(Purpose("logits", "run_1", 2, "asg_1"), 10, "aa", durable=True)
    ledger.record(Purpose("heartbeat"), 5, "bb", durable=False)
    ledger.record(Purpose("logits", "run_1", 3, "asg_2"), 7, "cc", durable=True)
    assert [one.sha256 for one in ledger.entries()] == ["aa", "bb", "cc"]
    assert ledger.totals() == {"logits": 17, "heartbeat": 5}


def test_a_line_cut_by_a_power_failure_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, now).record(Purpose("logits"), 10, "aa", durable=True)
    with open(path, "ab") as file:
        file.write(b'{"time": "2026-')
    Ledger(path, now).record(Purpose("logits"), 11, "bb", durable=True)
    assert [one.sha256 for one in Ledger(path, now).entries()] == ["aa", "bb"]


def test_writers_in_several_threads_keep_their_lines_whole(ledger: Ledger) -> None:
    def write() -> None:
        for _ in range(50):
            ledger.record(Purpose("progress"), 1, "a" * 64, durable=False)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.totals() == {"progress": 200}
