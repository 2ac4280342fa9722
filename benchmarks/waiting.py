"""The service: devices that wait for work.

Three measures. (1) Thousands of devices in a long poll of one API process: a round opens for one in a hundred of them;
how long until each has its assignment, and what a waiting device costs in memory. (2) Short polls answered with
"nothing for you", a second. (3) From the API's start to `/ready`. The database is PostgreSQL where it answers on
127.0.0.1 (one of our own, dropped at the end), else SQLite. Devices are bare sockets in one other process.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, exc, make_url, text

from benchmarks.measuring import Goal, print_goals, print_table, write_results
from benchmarks.service import PROFILE, Api, running_api
from persistence import enrolment, schema
from persistence.database import Database
from protocol.devices import DeviceProfile, EnrolmentRequest, EnrolmentTokenCreate

SERVER = os.environ.get("COTUNE_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1/test")
WAIT_SECONDS = 30
"""Of each long poll."""

PATIENCE_SECONDS = 240.0
"""For everything to be over."""

ASSIGNED, NOTHING = 200, 204
AGAIN_SECONDS = 1.0
"""After an error a device comes back, as the agent does."""

ONE_IN = 100
"""So many devices wait for each one that a round opens for."""

SETTLE_SECONDS = 1.0
"""From when all wait to the measure of memory."""

POLLING_CONNECTIONS = 16
POLLING_DEVICES = 200
"""Each polls again and again: the first poll of a device is looked up in the database, and those are few."""

POLL_SECONDS = 8.0
STARTS = 3


@contextmanager
def database_url(folder: Path) -> Iterator[str]:
    """A database of our own: on PostgreSQL where one answers, else SQLite in `folder`."""
    server = create_engine(SERVER, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    name = f"cotune_bench_{secrets.token_hex(6)}"
    try:
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except exc.OperationalError:
        server.dispose()
        yield f"sqlite:///{folder / 'cotune.sqlite3'}"
        return
    try:
        yield make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


def enrol(url: str, count: int) -> list[str]:
    """Enrol devices and return their credentials."""
    schema.upgrade(url)
    now = datetime.now(UTC)
    profile = DeviceProfile.model_validate(PROFILE)
    with closing(Connections(url)) as connections, connections.database.transaction() as session:
        token = enrolment.create_token(session, EnrolmentTokenCreate(uses=count), now).token
        request = EnrolmentRequest(token=token, name="device", profile=profile)
        return [enrolment.enrol(session, request, now).credential for _ in range(count)]


class Connections:
    """A database whose connections are closed."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)

    def close(self) -> None:
        """Close them."""
        self.database.dispose()


@dataclass
class Answers:
    """What devices in a long poll were answered.

    Attributes:
        assigned_at: when each one that got work did (`time.time`, seconds).
        errors: answers of every other status but "nothing for you", and connections that were lost, by what it was.
    """

    assigned_at: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


async def wait_for_work(port: int, credentials: Sequence[str], sent: asyncio.Event, num_active: int) -> Answers:
    """Let every device poll, again when it was told of nothing or an error, until `num_active` have work.

    Args:
        sent: set once every device has polled.
    """
    polled, answers, done = set[str](), Answers(), asyncio.Event()

    async def poll(credential: str) -> int:
        """Poll over one connection until there is another answer than "nothing for you"; return its status."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            status = NOTHING
            while status == NOTHING:
                writer.write(request_of(credential, WAIT_SECONDS))
                await writer.drain()
                polled.add(credential)
                if len(polled) == len(credentials):
                    sent.set()
                status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        return status

    async def device(credential: str) -> None:
        while (outcome := await outcome_of(credential)) != ASSIGNED:
            answers.errors[str(outcome)] += 1
            await asyncio.sleep(AGAIN_SECONDS)
        answers.assigned_at.append(time.time())
        if len(answers.assigned_at) == num_active:
            done.set()

    async def outcome_of(credential: str) -> int | str:
        try:
            return await poll(credential)
        except (OSError, EOFError) as error:
            return type(error).__name__

    tasks = []
    for number, credential in enumerate(credentials):
        tasks.append(asyncio.create_task(device(credential)))
        if number % 50 == 0:
            await asyncio.sleep(0.05)  # devices do not all start in one millisecond
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), PATIENCE_SECONDS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return answers


def request_of(credential: str, wait_seconds: int) -> bytes:
    """A poll as bytes."""
    return (
        f"GET /v1/devices/me/assignment?wait_seconds={wait_seconds} HTTP/1.1\r\nHost: cotune\r\n"
        f"Authorization: Bearer {credential}\r\n\r\n"
    ).encode()


async def poll_in_turn(port: int, credentials: Sequence[str], seconds: float) -> int:
    """Poll without waiting over a few connections that stay open; return the number of answers."""
    end = time.monotonic() + seconds

    async def connection(share: Sequence[str]) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answers = 0
        while time.monotonic() < end:
            writer.write(request_of(share[answers % len(share)], 0))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 204"), head
            answers += 1
        writer.close()
        return answers

    shares = [credentials[number::POLLING_CONNECTIONS] for number in range(POLLING_CONNECTIONS)]
    return sum(await asyncio.gather(*(connection(share) for share in shares)))


def devices_in_child(port: int, credentials_file: str, mode: str) -> None:
    """The devices' process: prints `waiting` when all poll, then the answers as JSON."""
    import uvloop

    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    credentials = json.loads(Path(credentials_file).read_text())

    async def run() -> Any:
        if mode == "short":
            return await poll_in_turn(port, credentials, POLL_SECONDS)
        sent = asyncio.Event()
        answers = asyncio.create_task(wait_for_work(port, credentials, sent, len(credentials[::ONE_IN])))
        await sent.wait()
        print("waiting", flush=True)
        return vars(await answers)

    print(json.dumps(uvloop.run(run())), flush=True)


@contextmanager
def devices(port: int, credentials: Sequence[str], folder: Path, mode: str) -> Iterator["subprocess.Popen[str]"]:
    """Start the devices' process."""
    file = folder / "credentials.json"
    file.write_text(json.dumps(credentials))
    command = [sys.executable, "-m", "benchmarks.waiting", "--devices", str(port), str(file), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def measure_waiting(api: Api, credentials: Sequence[str], folder: Path) -> dict[str, Any]:
    """Open a round for one device in a hundred of those that wait."""
    before = resident_kib(api.process.pid)
    active = [credential.partition(".")[0] for credential in credentials[::ONE_IN]]
    with devices(port_of(api), credentials, folder, "long") as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "waiting"
        started = time.monotonic()
        while waiting_devices(api) < len(credentials) and time.monotonic() - started < PATIENCE_SECONDS / 2:
            time.sleep(0.5)
        time.sleep(SETTLE_SECONDS)
        waiting = resident_kib(api.process.pid)
        opened = api.open_round(active)
        answers = Answers(**json.loads(process.stdout.readline()))
    got = sorted(at - opened for at in answers.assigned_at)
    return {
        "devices": len(credentials),
        "active": len(active),
        "assigned": len(got),
        "errors": answers.errors,
        "median_seconds": statistics.median(got),
        "p99_seconds": got[math.ceil(0.99 * len(got)) - 1],
        "kib_a_device": (waiting - before) / len(credentials),
    }


def measure_polls(api: Api, credentials: Sequence[str], folder: Path) -> float:
    """Return the polls a second that find nothing."""
    with devices(port_of(api), credentials, folder, "short") as process:
        assert process.stdout is not None
        return int(process.stdout.readline()) / POLL_SECONDS


def measure_start(folder: Path) -> float:
    """Return the median seconds from the start of the process to `/ready`, on an empty folder of state."""
    seconds = []
    for number in range(STARTS):
        started = time.perf_counter()
        with running_api(folder / str(number)) as api:
            httpx.get(f"{api.url}/ready", trust_env=False).raise_for_status()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def waiting_devices(api: Api) -> float:
    """How many devices the API says wait."""
    text = httpx.get(f"{api.url}/metrics", trust_env=False, timeout=60).text
    return float(text.partition("\ncotune_waiting_devices ")[2].split()[0])


def port_of(api: Api) -> int:
    """Where the API listens."""
    return int(api.url.rpartition(":")[2])


def resident_kib(pid: int) -> int:
    """The memory that a process holds now, KiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def main() -> None:
    """Measure, print, and write `results/bench_waiting.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="devices that wait")
    parser.add_argument("--devices", nargs=3, metavar=("PORT", "FILE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Each waiting device is a connection at both ends; the API's process inherits the limit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if options.devices:
        devices_in_child(int(options.devices[0]), *options.devices[1:])
        return
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as name, database_url(Path(name)) as url:
        folder = Path(name)
        start_seconds = measure_start(folder / "starts")
        credentials = enrol(url, options.count)
        with running_api(folder / "api", url) as api:
            polls = measure_polls(api, credentials[:POLLING_DEVICES], folder)
        with running_api(folder / "api", url) as api:
            waiting = measure_waiting(api, credentials, folder)
    backend = make_url(url).get_backend_name()
    print_table(
        f"{waiting['devices']} devices wait at one API process, {backend}; a round opens for {waiting['active']}",
        ("assigned", "errors", "median, s", "99 %, s", "KiB a device"),
        [
            [
                waiting["assigned"],
                ", ".join(f"{count} {what}" for what, count in waiting["errors"].items()) or "none",
                *(waiting[name] for name in ("median_seconds", "p99_seconds", "kib_a_device")),
            ]
        ],
    )
    goals = [
        Goal("99 % of the assignments after a round opens", waiting["p99_seconds"], 2.0, False, "s"),
        Goal("errors of all devices", sum(waiting["errors"].values()), 0, False, ""),
        Goal("active devices without an assignment", waiting["active"] - waiting["assigned"], 0, False, ""),
        Goal("memory of a waiting device", waiting["kib_a_device"], 50, False, "KiB"),
        Goal(f"polls that find nothing, a second, {backend}", polls, 1500, True, "/s"),
        Goal("start to ready", start_seconds, 2.0, False, "s"),
    ]
    print_goals("bench-waiting", goals)
    results = {"database": backend, "waiting": waiting, "polls_a_second": polls, "start_seconds": start_seconds}
    write_results("waiting", results | {"goals": [vars(goal) | {"met": goal.met} for goal in goals]})


if __name__ == "__main__":
    main()
