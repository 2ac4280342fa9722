"""The signatures of the chaos' uploads: the right ones hold before the service's own check, each wrong one does not."""

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.chaos.mutations import RIGHT, SIGNINGS, Upload, digest_of
from benchmarks.chaos.sending import Signer
from cloud_api.brief_memory import InProcessMemory
from cloud_api.signatures import RequestParts, verify
from edge_agent.signing import public_text
from protocol.errors import DomainError, ErrorCode
from protocol.headers import CONTENT_DIGEST_HEADER
from protocol.signatures import SIGNATURE_HEADER, SIGNATURE_INPUT_HEADER, request_values

PATH = "/v1/assignments/a/parts/logits"
REFUSALS = {
    "none": ErrorCode.SIGNATURE_REQUIRED,
    "another key": ErrorCode.SIGNATURE_INVALID,
    "another path": ErrorCode.SIGNATURE_INVALID,
    "another body": ErrorCode.SIGNATURE_INVALID,
    "a character changed": ErrorCode.SIGNATURE_INVALID,
    "an old one": ErrorCode.SIGNATURE_EXPIRED,
    "once more": ErrorCode.REQUEST_REPLAYED,
}


class Service:
    """What of the service judges a signature, with its memory of nonces."""

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.signer = Signer("dev_1.secret", self.key)
        self.memory = InProcessMemory()

    def judge(self, signing: str) -> None:
        """Send one upload, signed like this, to the service's own check; raises DomainError if it is refused."""
        upload = Upload(b"x", 1, digest_of(b"x"), "logits", signing)
        headers = self.signer.headers(PATH, upload)
        values = request_values(
            "PUT", PATH, "", lambda name: [upload.digest] if name == CONTENT_DIGEST_HEADER.lower() else []
        )
        signature_input, signature = headers.get(SIGNATURE_INPUT_HEADER), headers.get(SIGNATURE_HEADER)
        verify(
            RequestParts(values, has_body=True, signature_input=signature_input, signature=signature),
            "dev_1",
            public_text(self.key),
            memory=self.memory,
            now=datetime.now(UTC),
            window_seconds=300,
        )
        self.signer.answered(upload, headers, 201)


def test_a_signature_that_never_arrived_is_not_sent_once_more() -> None:
    service = Service()
    lost = Upload(b"x", 1, digest_of(b"x"), "logits")
    service.signer.answered(lost, service.signer.headers(PATH, lost), 0)
    with pytest.raises(DomainError) as refused:
        service.judge("once more")
    assert refused.value.code is ErrorCode.SIGNATURE_REQUIRED


def test_every_way_to_sign_wrongly_is_tried() -> None:
    assert set(REFUSALS) == set(SIGNINGS)


@pytest.mark.parametrize(("signing", "code"), sorted(REFUSALS.items()))
def test_a_spoilt_signature_is_refused_and_the_right_one_is_not(signing: str, code: ErrorCode) -> None:
    service = Service()
    service.judge(RIGHT)
    with pytest.raises(DomainError) as refused:
        service.judge(signing)
    assert refused.value.code is code
    service.judge(RIGHT)
