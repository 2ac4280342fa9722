"""`cotune demo`: the options, and how it ends."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from command_line import demo_story, folders
from command_line.demo_data import DemoData, generated_data, given_data
from command_line.errors import BadInput, CommandError
from command_line.interruption import Interrupted, interruption
from command_line.live_view import view
from command_line.output import console
from command_line.report import print_report
from command_line.results import write

DEFAULT_OUT = Path("results/demo.json")


def demo(
    *,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with public.jsonl and DOMAIN/{train,validation,test}.jsonl; default: our own."),
    ] = None,
    domains: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="With --data: the domains to use, one device each.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of co-tuning.")] = demo_story.ROUNDS,
    out: Annotated[Path, typer.Option(help="Where the results go, as JSON.")] = DEFAULT_OUT,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with state, logs and adapters.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Give up after so many seconds (exit code 3).")] = 3600.0,
) -> None:
    """Co-tune an LLM with three different small models on this machine, through the real API, queue and agents.

    Everything is real, only small: the API, a worker, a controller and one agent a device run as processes on
    127.0.0.1 and speak HTTP. The base models are built once and kept under $COTUNE_CACHE (default ~/.cache/cotune).
    Ctrl-C at any moment ends everything that was started.
    """
    out_console = console()
    with interruption() as state:
        _require_writable(out)
        cache = folders.prepare(folders.cache_folder(), what="the cache folder", variable="COTUNE_CACHE")
        with _work_folder(keep) as folder, view(out_console) as shown:
            options = demo_story.DemoOptions(
                data=_data(data, domains, folder), cache=cache, folder=folder, rounds=rounds, timeout_seconds=timeout
            )
            results = demo_story.play(options, shown, state)
            write(results, out)
        print_report(out_console, results)
        out_console.print(f"\nWritten to {out}", markup=False)
        if keep:
            out_console.print(f"State, logs and adapters are kept in {folder}", markup=False)


def _data(data: Path | None, domains: str | None, folder: Path) -> DemoData:
    if data is None:
        if domains is not None:
            raise BadInput("expected --domains together with --data, got it alone")
        return generated_data(folder / "data")
    return given_data(data, [each.strip() for each in (domains or "").split(",") if each.strip()])


def _require_writable(out: Path) -> None:
    if out.is_dir():
        raise BadInput(f"expected --out to be a file, got the folder {out}")
    folders.prepare(out.parent, what="the folder of the results", variable="--out")


@contextmanager
def _work_folder(keep: bool) -> Iterator[Path]:
    """A fresh folder for one demo. It stays if asked for, or if the demo failed and left logs that say why."""
    folder = Path(tempfile.mkdtemp(prefix="cotune-demo-"))
    try:
        yield folder
    except Interrupted:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except CommandError as error:
        if any((folder / "logs").glob("*")):
            error.next_step = error.next_step or f"the logs are in {folder / 'logs'}"
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
