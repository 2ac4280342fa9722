"""`make chaos`: runs without faults, then the same runs with them; prints a matrix and writes `results/chaos.json`.

Exit code 1 if an invariant did not hold, an upload was wrongly admitted, or fewer faults happened than asked for.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.chaos import plan as plans
from benchmarks.chaos.campaign import Campaign, Outcome
from benchmarks.chaos.cloud import API, CONTROLLER, WORKER, Cloud
from benchmarks.chaos.hardship import small_disk
from benchmarks.chaos.history import Adapters
from benchmarks.chaos.plan import Fault, Plan
from benchmarks.chaos.revocation import STAGES, Victims
from benchmarks.chaos.scenarios import ALL_DEVICES, STRATEGY, Gate, Scenario, late, moved, plain
from benchmarks.chaos.servers import Missing
from benchmarks.chaos.uploads import mutated_uploads
from benchmarks.chaos.zygote import HEAVY, LIGHT, Zygote
from persistence.tables import RunRow, VersionRow
from protocol.runs import Run

RESULTS = Path(__file__).parents[2] / "results" / "chaos.json"
MOST_PLAYS = 8
"""Of one plan, should its faults not all have found their moment before."""

CLOCKS = (
    {API: 60.0, "device": -86_400.0},
    {API: -60.0, "device": 86_400.0},
    {WORKER: 1.0, CONTROLLER: -0.5},
    {WORKER: -1.0, CONTROLLER: 0.5},
)
"""Seconds that processes are ahead; between those that share leases less than a lease."""


@dataclass
class Report:
    """Everything that was measured."""

    seed: int
    faults: list[Fault] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    uploads: dict[str, object] = field(default_factory=dict)
    replays: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Note a run's end, aloud."""
        self.outcomes.append(outcome)
        self.violations += [f"{outcome.name}: {each}" for each in outcome.violations]
        verdict = "holds" if not outcome.violations else f"BROKEN: {outcome.violations}"
        print(f"{outcome.name}: {outcome.rounds} rounds in {outcome.seconds:.0f} s; {verdict}", flush=True)


@dataclass
class Session:
    """What the phases share."""

    folder: Path
    files: Path
    light: Zygote
    heavy: Zygote
    seed: int
    until: float
    report: Report
    references: dict[str, Adapters] = field(default_factory=dict)
    """By scenario's key, what a run without faults makes."""

    @contextmanager
    def campaign(self, name: str, plan: Plan, *, served: bool, **options: object) -> Iterator[Campaign]:
        """A cloud of its own with its devices; the first one also plays the plain run without faults."""
        cloud = Cloud(self.folder / name, self.light, self.heavy, served, **options)  # type: ignore[arg-type]
        with cloud, Campaign(cloud, plan, self.files, self.seed) as campaign:
            if "plain" not in self.references:
                self._refer(campaign, [plain()], prepared=lambda run: self._make_logits_and_devices(campaign, run))
            else:
                campaign.add_devices()
            yield campaign
        self.report.faults += plan.happened
        self.report.missed += Counter(f"{fault.name}, {fault.moment}" for fault in plan.waiting)

    def exhaust(self, campaign: Campaign, name: str, scenarios: Sequence[Scenario]) -> None:
        """Play runs with faults, those of the scenarios at once, until all faults of the plan have happened."""
        if not all(each.key in self.references for each in scenarios):
            campaign.plan.active = False
            self._refer(campaign, scenarios)
        campaign.plan.active = True
        for number in range(1, MOST_PLAYS + 1):
            if not campaign.plan.waiting or time.monotonic() > self.until:
                break
            for outcome in campaign.play(f"{name} {number}", scenarios, references=self.references):
                self.report.add(outcome)
        campaign.plan.active = False

    def replay(self, campaign: Campaign, name: str) -> None:
        """Send all requests of the campaign's devices again."""
        answers, changed = campaign.replays().send()
        self.report.replays[name] = answers
        self.report.violations += [f"{name}: {each}" for each in changed]
        print(f"{name}: requests sent again: {answers}; {changed or 'nothing changed'}", flush=True)

    def _refer(
        self, campaign: Campaign, scenarios: Sequence[Scenario], prepared: Callable[[Run], None] | None = None
    ) -> None:
        for outcome in campaign.play("without faults", scenarios, prepared=prepared):
            self.references[outcome.key] = outcome.adapters
            self.report.add(outcome)
            number, (adapter, _) = max(outcome.adapters.items())
            print(f"  its version {number} is {str(adapter)[:12]}", flush=True)

    def _make_logits_and_devices(self, campaign: Campaign, run: Run) -> None:
        cloud = campaign.cloud
        row = cloud.read(lambda session: session.get_one(RunRow, run.run_id))
        version = cloud.read(lambda session: session.get_one(VersionRow, (run.run_id, 0)))
        hashes = (row.proxy_manifest_sha256, row.probe_set_sha256, version.proxy_adapter_sha256)
        logits = [str(self.files / f"logits-{number}.safetensors") for number in ALL_DEVICES]
        scratch = str(self.folder / "proxy")
        arguments = [str(cloud.blobs.folder), *map(str, hashes), json.dumps(STRATEGY), scratch, *logits]
        self.fork("benchmarks.chaos.files:make_logits", arguments)
        campaign.add_devices()

    def fork(self, call: str, arguments: list[str]) -> None:
        """Have something done that needs torch, and wait for it."""
        log = self.folder / "files.log"
        if code := self.heavy.wait(self.heavy.start(call, arguments, os.environ, log), 120):
            raise RuntimeError(f"{call} ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}")


def on_servers(session: Session) -> None:
    """PostgreSQL and Redis, killed too."""
    _on_servers(session, "PostgreSQL and Redis", plans.served_plan(session.seed), [plain()])


def moved_on_servers(session: Session) -> None:
    """Likewise, while operators move runs and updates come late; two federations at once."""
    _on_servers(session, "PostgreSQL and Redis moved", plans.served_moves_plan(session.seed), [moved(), late()])


def _on_servers(session: Session, name: str, plan: Plan, scenarios: Sequence[Scenario]) -> None:
    try:
        with session.campaign(scenarios[0].key + "-served", plan, served=True) as campaign:
            session.exhaust(campaign, name, scenarios)
            session.replay(campaign, name)
    except Missing as missing:
        session.report.skipped.append(f"{name}: {missing}")


def embedded(session: Session) -> None:
    """SQLite and a folder for a broker."""
    with session.campaign("embedded", plans.embedded_plan(session.seed), served=False) as campaign:
        session.exhaust(campaign, "SQLite", [plain()])
        session.replay(campaign, "SQLite")


def moved_embedded(session: Session) -> None:
    """Likewise, while operators move runs and updates come late; two federations at once."""
    with session.campaign("moved-embedded", plans.embedded_moves_plan(session.seed), served=False) as campaign:
        session.exhaust(campaign, "SQLite moved", [moved(), late()])
        session.replay(campaign, "SQLite moved")


def hostile(session: Session) -> None:
    """Devices that are revoked while they deliver, and devices that send spoilt uploads."""
    with session.campaign("hostile", Plan(), served=False) as campaign:
        name, gates = "revoked devices", {number: Gate(0, number, number - 1) for number in range(1, len(STAGES) + 1)}
        scenario = replace(plain(rounds=len(STAGES)), gates=tuple(gates.values()))
        logits = session.files / "logits-0.safetensors"
        victims = Victims(
            campaign.cloud, campaign.plan, logits, lambda number: campaign.gate(name, scenario, gates[number])
        )
        outcomes = campaign.play(name, [scenario], references=session.references, each_round=victims.start)
        victims.join()
        outcomes[0].violations += victims.admitted_afterwards
        session.report.add(outcomes[0])
        session.report.uploads = mutated_uploads(campaign, session.report.seed, session.until)
        session.report.violations += session.report.uploads.pop("wrong")  # type: ignore[arg-type]


def full_disk(session: Session) -> None:
    """Everything that the service keeps lies on a small disk, which runs full."""
    with small_disk(session.folder / "disk") as disk:
        if disk is None:
            session.report.skipped.append("full disk: this user may not mount one")
            return
        plan = plans.full_disk_plan(session.seed)
        with session.campaign("full-disk", plan, served=False, home=disk) as campaign:
            session.exhaust(campaign, "full disk", [plain()])


def wrong_clocks(session: Session) -> None:
    """Processes that do not agree on the time."""
    for number, clocks in enumerate(CLOCKS):
        if time.monotonic() > session.until:
            session.report.skipped.append(f"clocks {number}: no time was left")
            continue
        shown = ", ".join(f"{name} {seconds:+g} s" for name, seconds in clocks.items())
        plan = Plan([Fault("clock", shown, done=True, where=f"clocks {number}")])
        with session.campaign(f"clocks-{number}", plan, served=False, clocks=clocks) as campaign:
            for outcome in campaign.play(f"clocks {number}", [plain(rounds=1)], references=session.references):
                session.report.add(outcome)


PHASES = {
    "served": on_servers,
    "served-moves": moved_on_servers,
    "embedded": embedded,
    "embedded-moves": moved_embedded,
    "hostile": hostile,
    "disk": full_disk,
    "clocks": wrong_clocks,
}


def main() -> int:
    """Run the phases and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the order of the faults (default: 1)")
    parser.add_argument("--seconds", type=float, default=900, help="begin nothing new after so long (default: 900)")
    parser.add_argument("--phases", default=",".join(PHASES), help="some of them, by comma (default: %(default)s)")
    parser.add_argument("--least-faults", type=int, default=200, help="fail with fewer (default: 200)")
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder with the logs")
    options = parser.parse_args()
    started = time.monotonic()
    report = Report(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="cotune-chaos-"))
    folder.chmod(0o711)  # PostgreSQL runs as another user where we are root
    print(f"seed {options.seed}; state and logs in {folder}", flush=True)
    with ExitStack() as stack:
        if not options.keep:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        light = stack.enter_context(Zygote(LIGHT, folder / "light.log"))
        heavy = stack.enter_context(Zygote(HEAVY, folder / "heavy.log"))
        files = folder / "files"
        files.mkdir()
        session = Session(folder, files, light, heavy, options.seed, started + options.seconds, report)
        session.fork("benchmarks.chaos.files:make_llm", [str(files / "llm"), str(files / "public.jsonl")])
        for name in options.phases.split(","):
            PHASES[name](session)
    return _conclude(report, time.monotonic() - started, options.least_faults)


def _conclude(report: Report, seconds: float, least: int) -> int:
    _print(report, seconds)
    _write(report, seconds)
    return int(bool(report.violations) or len(report.faults) < least)


def _grouped(report: Report) -> dict[tuple[str, str], list[Fault]]:
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in report.faults:
        groups.setdefault((fault.name, fault.moment), []).append(fault)
    return dict(sorted(groups.items()))


def _print(report: Report, seconds: float) -> None:
    by_kind: dict[str, list[Fault]] = {}
    for fault in report.faults:
        by_kind.setdefault(fault.name, []).append(fault)
    table = Table("fault", "times", "moments", "in a run that broke", title="Faults")
    for name, faults in sorted(by_kind.items()):
        moments = len({fault.moment for fault in faults})
        table.add_row(name, str(len(faults)), str(moments), str(sum(fault.broken for fault in faults)))
    Console(width=110).print(table)
    rounds = sum(outcome.rounds for outcome in report.outcomes)
    print(f"{len(report.faults)} faults in {rounds} rounds of {len(report.outcomes)} runs, {seconds:.0f} s")
    for line in _not_done(report):
        print(f"not done: {line}")
    print(f"requests sent again when their runs were over: {json.dumps(report.replays, indent=1)}")
    print(f"mutated uploads: {json.dumps(report.uploads, indent=1)}")
    for violation in report.violations:
        print(f"BROKEN {violation}")


def _write(report: Report, seconds: float) -> None:
    result = {
        "seed": report.seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()},
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "faults": len(report.faults),
        "runs": [
            {"name": each.name, "rounds": each.rounds, "seconds": round(each.seconds, 1), "broken": each.violations}
            for each in report.outcomes
        ],
        "matrix": [
            {"fault": name, "moment": moment, "times": len(faults), "broken": sum(fault.broken for fault in faults)}
            for (name, moment), faults in _grouped(report).items()
        ],
        "not_done": _not_done(report),
        "sent_again": report.replays,
        "mutated_uploads": report.uploads,
        "broken": report.violations,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _not_done(report: Report) -> list[str]:
    return report.skipped + [f"{missed} ({times})" for missed, times in sorted(report.missed.items())]


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
