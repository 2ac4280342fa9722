"""The mutations and the judge of the chaos' uploads."""

import random

import pytest

from benchmarks.chaos.device import write_safetensors
from benchmarks.chaos.mutations import (
    MUTATIONS,
    Judge,
    Mutation,
    Tally,
    Upload,
    flip_data,
    plain,
    rewrite_harmlessly,
    spoil_metadata,
    spoil_signature,
    wrong_digest,
    wrong_length,
)
from protocol.safetensors_header import TensorInfo

TENSORS = {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("F32", (4,))}
VALID = {
    "adapter_delta": write_safetensors(TENSORS, bytes(40), {"format": "one", "base": "ab"}),
    "logits": write_safetensors({"ids": TensorInfo("F32", (2,))}, bytes(8), {"method": "x"}),
}
BOUND = {"adapter_delta": {"format": "one", "base": "ab"}, "logits": {"proxy_sha256": "cd"}}
JUDGE = Judge(VALID, BOUND)


@pytest.mark.parametrize("kind", sorted(VALID))
@pytest.mark.parametrize("harmless", [flip_data, rewrite_harmlessly])
def test_what_changes_no_header_is_admissible(kind: str, harmless: Mutation) -> None:
    assert JUDGE.admissible(plain(VALID[kind], kind))
    chance = random.Random(0)
    assert all(JUDGE.admissible(harmless(chance, VALID[kind], kind)) for _ in range(50))


@pytest.mark.parametrize("mutation", sorted(MUTATIONS, key=lambda each: each.__name__))
def test_every_mutation_can_be_sent_and_most_must_be_refused(mutation: Mutation) -> None:
    chance = random.Random(1)
    uploads = [mutation(chance, VALID[kind], kind) for _ in range(100) for kind in sorted(VALID)]
    assert all(upload.body != b"" or upload.length == 0 for upload in uploads)
    refused = sum(not JUDGE.admissible(upload) for upload in uploads)
    if mutation in (wrong_digest, wrong_length, spoil_signature):
        assert refused == len(uploads)
    elif mutation not in (flip_data, rewrite_harmlessly):
        assert refused > len(uploads) / 4


def test_logits_may_be_silent_about_their_round_but_not_wrong() -> None:
    uploads = [spoil_metadata(random.Random(seed), VALID["logits"], "logits") for seed in range(200)]
    wrong = [upload for upload in uploads if b"proxy_sha256" in upload.body]
    assert wrong
    assert not any(JUDGE.admissible(upload) for upload in wrong if b'"proxy_sha256": "cd"' not in upload.body)


@pytest.mark.parametrize(
    ("status", "code", "admissible", "wrong", "stricter"),
    [
        (201, "", True, 0, 0),
        (201, "", False, 1, 0),
        (200, "", False, 1, 0),
        (500, "internal_error", False, 1, 0),
        (503, "unavailable", True, 1, 0),
        (422, "not_safetensors", False, 0, 0),
        (422, "not_safetensors", True, 0, 1),
    ],
)
def test_the_tally_tells_right_from_wrong(
    *, status: int, code: str, admissible: bool, wrong: int, stricter: int
) -> None:
    tally = Tally()
    tally.add("mutation", Upload(b"x", 1, "", "logits"), status, code, admissible=admissible)
    assert (len(tally.wrong), tally.stricter.total()) == (wrong, stricter)
