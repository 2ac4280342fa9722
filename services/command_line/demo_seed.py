"""What a deployment needs for a demo: models and data in a folder, a token for each device, and a run that uses them.

The folder is shared with the worker and the agents, so every path in it is theirs too:

    data/                 the project's own domains, as `cotune demo` has them
    cache/base_models/    the base models
    devices/<name>/       `model`, `train.jsonl`, `test.jsonl` (links into the above), `token`, `domain`
    run.json              the run, once it is created: then everything is there
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from command_line import demo_settings
from command_line.api_client import ApiClient
from command_line.demo_data import DemoData, generated_data, write_mix
from command_line.demo_devices import device_name
from command_line.demo_models import DemoModels, prepare_models
from command_line.live_view import View
from protocol.devices import EnrolmentTokenCreate
from protocol.runs import Run, RunCreate

TOKEN_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Seed:
    """Where to, and how long the run shall be."""

    folder: Path
    rounds: int


def plant(seed: Seed, client: ApiClient, view: View) -> Run:
    """Write what is missing, create the run if there is none, and return it. A second call changes nothing.

    Raises:
        CommandError: a folder cannot be written, a base model cannot be built, or the API does not answer or refuses.
    """
    done = seed.folder / "run.json"
    if done.exists():
        return client.get_run(Run.model_validate_json(done.read_bytes()).run_id)
    view.step("Base models and data for the devices")
    data = generated_data(seed.folder / "data")
    models = prepare_models(data, seed.folder / "cache", view)
    view.step("A token for each device, and the run")
    for index, domain in enumerate(data.domains):
        _prepare_device(seed.folder / "devices" / device_name(index), data, domain, models.slm(index).folder, client)
    run = client.create_run(_config(seed, data, models).model_dump(mode="json"), idempotency_key=_key(seed.folder))
    _replace(done, run.model_dump_json())
    return run


def _prepare_device(folder: Path, data: DemoData, domain: str, model: Path, client: ApiClient) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    targets = {"model": model, "train.jsonl": data.split(domain, "train"), "test.jsonl": data.split(domain, "test")}
    for name, target in targets.items():
        (folder / name).unlink(missing_ok=True)
        # Relative: the folder may be mounted elsewhere.
        (folder / name).symlink_to(os.path.relpath(target, folder))
    (folder / "domain").write_text(domain, encoding="utf-8")
    if not (folder / "token").exists():
        request = EnrolmentTokenCreate(note=f"demo: {folder.name}", expires_in_seconds=TOKEN_SECONDS)
        _replace(folder / "token", client.create_token(request).token)


def _config(seed: Seed, data: DemoData, models: DemoModels) -> RunCreate:
    mix = seed.folder / "data" / "mix.jsonl"
    write_mix(data, mix, rows_a_domain=demo_settings.TEST_ROWS)
    return demo_settings.co_plms_run(
        rounds=seed.rounds,
        devices=len(data.domains),
        given=data.given,
        llm=models.llm.folder,
        proxy=models.proxy.folder,
        public_data=data.public,
        evaluation_data=mix,
    )


def _key(folder: Path) -> str:
    """The run's idempotency key: on disk before the run is asked for, so that a second try asks for the same one."""
    path = folder / "run.key"
    if not path.exists():
        _replace(path, secrets.token_hex(16))
    return path.read_text(encoding="ascii")


def _replace(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, and that only this user may read."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
