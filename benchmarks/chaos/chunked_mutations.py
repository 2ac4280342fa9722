"""Spoilt files that come in chunks, and chunks that are spoilt: none of them may become a part of an update."""

import random
import time
from collections.abc import Mapping

import httpx

from benchmarks.chaos.mutations import MUTATIONS, Judge, Tally, Upload, digest_of, name_of, plain

LIES = ("other bytes than announced", "a chunk too short", "a chunk too far on", "a chunk's digest", "completed early")
"""What may be wrong with a valid file's chunks."""

LIE_SHARE = 0.2


def send_in_chunks(  # noqa: PLR0917
    http: httpx.Client, assignment_id: str, valid: Mapping[str, bytes], judge: Judge, count: int, seed: int,
    until: float,
) -> Tally:  # fmt: skip
    """Send so many spoilt files in chunks, each until it is refused; stop at `until` (monotonic) whatever is left.

    Args:
        http: signs as the device of the assignment, which has no part yet.
        valid: by kind of part, a file that the round would admit; none is sent as it is.
    """
    tally, chance = Tally(), random.Random(f"{seed} in chunks")
    while tally.sent.total() < count and time.monotonic() < until:
        kind = chance.choice(sorted(valid))
        lie = chance.choice(LIES) if chance.random() < LIE_SHARE else None
        if lie is None:
            [mutation] = chance.choices(list(MUTATIONS), list(MUTATIONS.values()))
            name, upload = name_of(mutation), mutation(chance, valid[kind], kind)
            if not upload.body or upload != plain(upload.body, upload.kind) or judge.admissible(upload):
                continue
        else:
            name, upload = lie, plain(valid[kind], kind)
        status, code = _send(http, f"/v1/assignments/{assignment_id}/parts/{upload.kind}/uploads", upload, lie)
        tally.add(name, upload, status, code, admissible=False)
    return tally


def _send(http: httpx.Client, path: str, upload: Upload, lie: str | None) -> tuple[int, str]:
    """Return the status and the code of the first refusal; of the completion where there was none."""
    content = upload.body
    headers = {"Upload-Length": str(len(content)), "Repr-Digest": upload.digest}
    answer = http.post(path, headers=headers)
    if not answer.is_success:
        return _told(answer)
    size, place = answer.json()["chunk_bytes"], f"{path}/{answer.json()['upload_id']}"
    if lie == LIES[0]:
        content = content[:-1] + bytes([content[-1] ^ 1])
    for offset in range(answer.json()["received_bytes"], len(content), size):
        if lie == LIES[4] and offset + size >= len(content):
            break
        chunk = content[offset : offset + size]
        digest = digest_of(chunk + b"x" if lie == LIES[3] else chunk)
        chunk = chunk[:-1] if lie == LIES[1] else chunk
        at = offset + size if lie == LIES[2] else offset
        answer = http.patch(place, content=chunk, headers={"Content-Digest": digest, "Upload-Offset": str(at)})
        if not answer.is_success:
            return _told(answer)
    return _told(http.post(f"{place}/completion"))


def _told(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, "" if answer.is_success else str(answer.json().get("code", ""))
