"""The API's own TLS: with a certificate it speaks https only, with a client authority it knows its clients."""

import ipaddress
import socket
import ssl
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_api import security
from command_line import folders
from command_line.api_client import ApiClient
from command_line.errors import BadInput
from edge_agent.client import CloudClient
from edge_agent.errors import CloudUnavailable
from edge_agent.ledger import Ledger
from edge_agent.settings import ServerSection, tls_context
from tests.cloud_api.running_api import PROFILE
from tests.cloud_api.test_process import refused, started
from tests.cloud_api.test_reading import answer, digest, exchange_all_sizes, request, serving


@dataclass
class Authority:
    """A certificate authority and what it signed, as files."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.pem"

    def sign(self, name: str, host: str | None = None) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), self.name, key)
        if host:
            names = [x509.IPAddress(ipaddress.ip_address(host))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
        )
        return _write(self.folder, name, builder.sign(self.key, hashes.SHA256()), key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _write(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    paths = (folder / f"{name}.pem", folder / f"{name}.key")
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encryption = serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    return paths


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca of the tests")])
    builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = builder.add_extension(usage, critical=True)
    _write(folder, "ca", builder.sign(key, hashes.SHA256()), key)
    return Authority(folder, key, name)


def test_the_api_speaks_tls_and_knows_its_clients(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.sign("server", "127.0.0.1")
    client_certificate, client_key = authority.sign("client")
    environment = {
        "COTUNE_TLS_CERTIFICATE": str(certificate),
        "COTUNE_TLS_KEY": str(key),
        "COTUNE_TLS_CLIENT_CA": str(authority.certificate),
    }
    server = {"url": "https://127.0.0.1", "ca_file": authority.certificate}
    problems: list[str] = []
    anonymous = tls_context(ServerSection.model_validate(server), problems)
    known = tls_context(
        ServerSection.model_validate(server | {"client_certificate": client_certificate, "client_key": client_key}),
        problems,
    )
    assert problems == []
    with started(tmp_path / "home", tmp_path / "api.log", **environment) as process:
        assert process.url.startswith("https://127.0.0.1:")
        operator_key = (process.home / "operator.key").read_text().strip()
        shown = {"COTUNE_CA_FILE": authority.certificate, "COTUNE_CLIENT_CERTIFICATE": client_certificate}
        context = folders.tls_context(
            {name: str(path) for name, path in (shown | {"COTUNE_CLIENT_KEY": client_key}).items()}
        )
        with ApiClient(process.url, operator_key, tls=context) as operator:
            assert operator.list_devices() == []
        with httpx.Client(base_url=process.url, verify=known, trust_env=False) as http:
            headers = {"Authorization": f"Bearer {operator_key}"}
            token = http.post("/v1/enrolment-tokens", json={}, headers=headers).json()["token"]
            receipt = http.post("/v1/devices", json={"token": token, "name": "x", "profile": PROFILE}).json()
        with pytest.raises(httpx.TransportError), httpx.Client(verify=anonymous, trust_env=False) as http:
            http.get(f"{process.url}/health")
        with pytest.raises(httpx.ConnectError, match="verify failed"), httpx.Client(trust_env=False) as http:
            http.get(f"{process.url}/health")
        with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False) as http:
            http.get(f"{process.url.replace('https', 'http')}/health")
        ledger = Ledger(tmp_path / "ledger.jsonl", lambda: datetime.now(UTC))
        for context, answered in ((known, True), (None, False)):
            with CloudClient(
                process.url,
                receipt["credential"],
                ledger,
                threading.Event(),
                now=lambda: datetime.now(UTC),
                tls=context,
            ) as device:
                if answered:
                    assert device.whoami().device_id == receipt["device_id"]
                else:
                    with pytest.raises(CloudUnavailable, match="certificate"):
                        device.whoami()


def test_large_bodies_come_whole_over_tls(authority: Authority) -> None:
    with serving(*authority.sign("large", "127.0.0.1")) as served:
        served.tls = ssl.create_default_context(cafile=str(authority.certificate))
        exchange_all_sizes(served)


def test_a_handshake_that_fails_is_the_clients_affair(authority: Authority) -> None:
    with serving(*authority.sign("handshake", "127.0.0.1")) as served:
        for said in (b"GET / HTTP/1.1\r\n\r\n", b""):
            with socket.create_connection(("127.0.0.1", served.port), timeout=10) as plain:
                plain.sendall(said)
                plain.shutdown(socket.SHUT_WR)
                while plain.recv(64):
                    continue
        served.tls = ssl.create_default_context()
        with pytest.raises(ssl.SSLError, match="verify failed"), served.connection():
            pass
        served.tls = ssl.create_default_context(cafile=str(authority.certificate))
        with served.connection() as known:
            known.sendall(request("/digest", b"body"))
            assert answer(known) == digest(b"body")


def test_tls_files_that_cannot_be_used_are_told_at_the_start(tmp_path: Path, authority: Authority) -> None:
    certificate, key = map(str, authority.sign("server2", "127.0.0.1"))
    other_key = str(authority.sign("other")[1])
    for changed, told in (
        ({"COTUNE_TLS_CERTIFICATE": certificate}, "both COTUNE_TLS_CERTIFICATE and COTUNE_TLS_KEY"),
        ({"COTUNE_TLS_CERTIFICATE": certificate, "COTUNE_TLS_KEY": "/nowhere"}, "COTUNE_TLS_KEY: expected a file"),
        ({"COTUNE_TLS_CERTIFICATE": certificate, "COTUNE_TLS_KEY": other_key}, "certificate and its key"),
    ):
        with pytest.raises((ValueError, OSError), match=told):
            security.tls(changed)
    assert told in refused(tmp_path, "--port", "0", **changed)
    with pytest.raises(BadInput, match="COTUNE_CA_FILE"):
        folders.tls_context({"COTUNE_CA_FILE": key})
    assert folders.tls_context({}) is None
    assert [folders.api_scheme(each) for each in ({}, {"COTUNE_TLS_CERTIFICATE": key})] == ["http", "https"]
    problems: list[str] = []
    section = ServerSection.model_validate({"url": "https://x", "ca_file": key})
    assert tls_context(section, problems) is None
    assert "PEM" in problems[0]
    assert isinstance(tls_context(section.model_copy(update={"ca_file": authority.certificate}), []), ssl.SSLContext)
