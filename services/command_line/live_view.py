"""What a demo shows while it runs: one view that redraws itself on a terminal, short plain lines anywhere else."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from command_line.output import bytes_text, seconds_text
from command_line.watching import Look, changes, round_words
from protocol.runs import RoundDevice
from protocol.statuses import AssignmentStatus

NOTICES = 5
"""Lines of news that the live view keeps."""

STATUS_STYLE = {
    AssignmentStatus.TRAINING: "cyan",
    AssignmentStatus.UPLOADING: "blue",
    AssignmentStatus.SUBMITTED: "green",
    AssignmentStatus.COUNTED: "green",
    AssignmentStatus.QUARANTINED: "yellow",
    AssignmentStatus.REJECTED: "red",
    AssignmentStatus.LATE: "red",
    AssignmentStatus.LOST: "red",
}


class View(ABC):
    """Tells a person how far things are. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    def step(self, name: str) -> None:
        """A new part of the story begins."""

    @abstractmethod
    def say(self, line: str) -> None:
        """Something happened that a person wants to know."""

    @abstractmethod
    def progress(self, label: str, done: int, total: int) -> None:
        """A long piece of work is `done` of `total` far."""

    @abstractmethod
    def show(self, looks: Sequence[Look]) -> None:
        """The runs are like this now."""

    @abstractmethod
    def facts(self, facts: dict[str, str]) -> None:
        """Where things are: the API's address, the logs."""


class PlainView(View):
    """One short line for each thing that happened, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._looks: dict[str, Look] = {}
        self._finished: set[str] = set()

    def step(self, name: str) -> None:
        """See `View`."""
        self._line(name)

    def say(self, line: str) -> None:
        """See `View`."""
        self._line(f"  {line}")

    def progress(self, label: str, done: int, total: int) -> None:
        """See `View`. Only the end is told."""
        if done >= total and label not in self._finished:
            self._finished.add(label)
            self._line(f"  {label}: done")

    def show(self, looks: Sequence[Look]) -> None:
        """See `View`."""
        for look in looks:
            for line in changes(self._looks.get(look.run.run_id), look):
                self._line(f"  {line}")
            self._looks[look.run.run_id] = look

    def facts(self, facts: dict[str, str]) -> None:
        """See `View`."""
        for name, value in facts.items():
            self._line(f"  {name}: {value}")

    def _line(self, text: str) -> None:
        elapsed = time.monotonic() - self.started_at
        self.console.print(f"[{elapsed:4.0f} s] {text}", markup=False, soft_wrap=True)


class LiveView(View):
    """One picture, redrawn a few times a second, gone when the view is left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._step = ""
        self._facts: dict[str, str] = {}
        self._notices: deque[str] = deque(maxlen=NOTICES)
        self._looks: Sequence[Look] = ()
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def step(self, name: str) -> None:
        """See `View`."""
        for task in self._bars.values():
            self._progress.remove_task(task)
        self._bars.clear()
        self._step = name

    def say(self, line: str) -> None:
        """See `View`."""
        self._notices.append(f"{time.monotonic() - self.started_at:4.0f} s  {line}")

    def progress(self, label: str, done: int, total: int) -> None:
        """See `View`."""
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._bars[label], completed=done, total=total)

    def show(self, looks: Sequence[Look]) -> None:
        """See `View`."""
        self._looks = tuple(looks)

    def facts(self, facts: dict[str, str]) -> None:
        """See `View`."""
        self._facts = facts

    def _render(self) -> RenderableType:
        elapsed = seconds_text(time.monotonic() - self.started_at)
        parts: list[RenderableType] = [Text.assemble((self._step, "bold"), f"   {elapsed}")]
        parts += [Text(f"{name}: {value}", style="dim", overflow="fold") for name, value in self._facts.items()]
        if self._bars:
            parts.append(self._progress)
        parts += [run_panel(look) for look in self._looks]
        if self._notices:
            parts.append(Text("\n".join(self._notices), style="yellow"))
        return Group(*parts)


def view(console: Console) -> View:
    """Return the view that suits where the console writes to."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


def run_panel(look: Look) -> Panel:
    """Draw a run: its round and stage, each device, the bytes."""
    now = look.round
    where = look.run.status.value if now is None else round_words(look.run, now.status)
    head = f"round {look.run.current_round} of {look.run.config.rounds}   {where}"
    if look.run.status_reason:
        head += f"   {look.run.status_reason}"
    parts: list[RenderableType] = [Text(head)]
    if now is not None and now.devices:
        devices = Table(box=None, pad_edge=False, expand=True)
        for column in ("device", "state", "stage", "", "losses"):
            devices.add_column(column, ratio=3 if column == "losses" else None, no_wrap=True)
        for device in now.devices:
            devices.add_row(*_device_row(device))
        parts.append(devices)
    up, down = sum(look.traffic.up.values()), sum(look.traffic.down.values())
    parts.append(Text(f"devices sent {bytes_text(up)}, received {bytes_text(down)}", style="dim"))
    return Panel(Group(*parts), title=f"{look.run.name} - {look.run.status}", title_align="left")


def _device_row(device: RoundDevice) -> list[RenderableType]:
    losses = "  ".join(f"{name} {value:.3f}" for name, value in device.losses.items())
    bar: RenderableType = Text("")
    if device.steps and device.step is not None:
        bar = ProgressBar(total=device.steps, completed=device.step, width=16)
    return [
        Text(device.device_name),
        Text(device.status.value, style=STATUS_STYLE.get(device.status, "dim")),
        Text(device.stage or ""),
        bar,
        Text(device.reason or losses),
    ]
