"""Who this device is: enrolment, once, and the check of what the owner configured."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from assets.data import read_examples
from assets.errors import AssetError
from edge_agent import profile
from edge_agent.client import CloudClient
from edge_agent.errors import AlreadyEnrolled, ConfigurationError
from edge_agent.ledger import Ledger
from edge_agent.profile import ModelDescription
from edge_agent.settings import (
    CONFIG_FILE,
    CREDENTIAL_FILE,
    Config,
    read_credential,
    tls_context,
    validate,
    write_config,
    write_credential,
)
from edge_agent.signing import make_key, public_text, request_key
from protocol.devices import DeviceProfile, EnrolmentReceipt, EnrolmentRequest
from protocol.statuses import DeviceStatus

UNASSIGNED = "unassigned"
"""Stands for the device id until the server has given one."""


@dataclass(frozen=True)
class Enrolled:
    """What enrolment gave."""

    config: Config
    waits_for_approval: bool


def enrol(
    home: Path,
    *,
    server: str,
    token: str,
    name: str,
    model: str,
    data: str,
    test: str | None,
    domain: str | None,
    now: Callable[[], datetime],
    ca_file: str | None = None,
    client_certificate: str | None = None,
    client_key: str | None = None,
) -> Enrolled:
    """Give this home folder an identity. Everything is checked before the token is spent.

    The key that signs this device's requests is made first; the server gets its public half. An enrolment that was cut
    off is finished by enrolling again with the same arguments: if the answer was on disk, without the server; if it was
    lost on its way, the server gives the same one again (for 24 hours), and a one-time token is not lost with it.

    Raises:
        AlreadyEnrolled: it has one; it never changes.
        ConfigurationError: something given is wrong; all problems at once.
        CloudError: the server did not answer, or refused the token.
    """
    if (home / CONFIG_FILE).exists():
        raise AlreadyEnrolled(f"{home} is enrolled already; a second device needs another --home")
    problems: list[str] = []
    values = {
        "server": {
            "url": server,
            "ca_file": ca_file and absolute(ca_file),
            "client_certificate": client_certificate and absolute(client_certificate),
            "client_key": client_key and absolute(client_key),
        },
        "device": {"id": UNASSIGNED, "name": name, "domain": domain},
        "model": {"path": absolute(model)},
        "data": {"train": absolute(data), "test": absolute(test) if test else None},
    }
    config = validate(values, "enroll", problems)
    request = key = None
    if not 8 <= len(token) <= 256:
        problems.append(f"enroll: token: expected 8 to 256 characters, got {len(token)}")
    if config is not None:
        tls_context(config.server, problems)
        device = check_inputs(config, problems)
        if device is not None and not problems:
            key = _signing_key(home)
            request = EnrolmentRequest(token=token, name=name, profile=device, public_key=public_text(key))
    if config is None or request is None or key is None:
        raise ConfigurationError(problems)
    device_id, waits = _interrupted_enrolment(home), False
    if device_id is None:
        receipt = _ask_for_identity(home, config, request, key, now)
        device_id, waits = receipt.device_id, receipt.status is DeviceStatus.PENDING
    config = config.model_copy(update={"device": config.device.model_copy(update={"id": device_id})})
    write_config(home, config)
    return Enrolled(config, waits)


def _signing_key(home: Path) -> Ed25519PrivateKey:
    try:
        return make_key(home)
    except ValueError as error:
        raise ConfigurationError([str(error)]) from None


def check_inputs(config: Config, problems: list[str]) -> DeviceProfile | None:
    """Look at the model and the data files; add what is wrong to `problems`, else return the device's profile."""
    model: ModelDescription | None = profile.describe_model(config.model.path, problems)
    num_examples = _count_rows(config.data.train, problems)
    if config.data.test is not None:
        _count_rows(config.data.test, problems)
    return None if problems or model is None else profile.build(config, model, num_examples)


def absolute(path_or_name: str) -> str:
    """Return an existing path made absolute, so that the agent may start in any folder; a hub name stays as it is."""
    path = Path(path_or_name).expanduser()
    return str(path.resolve()) if path.exists() else path_or_name


def _count_rows(path: Path, problems: list[str]) -> int:
    try:
        rows = len(read_examples(path))
    except AssetError as error:
        problems.append(str(error))
        return 0
    if rows == 0:
        problems.append(f"{path}: expected at least one row, found none")
    return rows


def _interrupted_enrolment(home: Path) -> str | None:
    path = home / CREDENTIAL_FILE
    problems: list[str] = []
    credential = read_credential(path, problems) if path.exists() else ""
    return credential.partition(".")[0] if credential and not problems else None


def _ask_for_identity(
    home: Path, config: Config, request: EnrolmentRequest, key: Ed25519PrivateKey, now: Callable[[], datetime]
) -> EnrolmentReceipt:
    ledger = Ledger(home / "ledger.jsonl", now)
    tls = tls_context(config.server, [])
    with CloudClient(config.server.url, None, ledger, threading.Event(), now=now, tls=tls) as client:
        receipt = client.enrol(request, request_key(key, request.model_dump_json().encode()))
    write_credential(home, receipt.credential)
    return receipt
