"""`cotune demo-seed`: a demo on a deployment that runs already."""

from pathlib import Path
from typing import Annotated

import typer

from command_line import folders
from command_line.connection import Server, connect
from command_line.demo_seed import Seed, plant
from command_line.demo_story import ROUNDS
from command_line.live_view import view
from command_line.output import console


def demo_seed(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; the worker and the agents must see it.")],
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of co-tuning.")] = ROUNDS,
    server: Server = None,
) -> None:
    """Write a demo's models, data and enrolment tokens into FOLDER and create its run. Done once; again is harmless.

    For docker-compose.yml's profile `demo`, which mounts FOLDER at the same place in the worker and in three agents.
    """
    out = console()
    folder = folders.prepare(folder, what="the demo's folder", variable="FOLDER")
    with connect(server) as client, view(out) as shown:
        run = plant(Seed(folder, rounds), client, shown)
    out.print(f"Run {run.run_id} is {run.status}; devices: {folder / 'devices'}", markup=False, soft_wrap=True)
