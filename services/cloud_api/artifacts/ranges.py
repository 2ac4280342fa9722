"""Which bytes of a file a request wants: RFC 9110 sections 13 and 14, for one range of one file."""

import re
from dataclasses import dataclass

from protocol.errors import DomainError, ErrorCode

_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.IGNORECASE)
_LONGEST_NUMBER = 18  # digits; more than any file, and no cost to convert


class RangeNotSatisfiable(DomainError):
    """The range lies outside the file. The answer says how long the file is."""

    def __init__(self, value: str, size: int) -> None:
        detail = f"the file has {size} bytes, the range is {value[:80]!r}"
        super().__init__(ErrorCode.RANGE_NOT_SATISFIABLE, detail, expected=f"within 0-{size - 1}", received=value[:80])
        self.headers = {"Content-Range": f"bytes */{size}"}


@dataclass(frozen=True)
class ByteRange:
    """The bytes from `start` up to and not including `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.stop - self.start


def parse_range(value: str, size: int) -> ByteRange | None:
    """Return the bytes that a `Range` header names in a file of `size` bytes.

    None: send the whole file, as RFC 9110 asks for a header that is malformed, of another unit, or (which a server may
    choose) of several ranges.

    Raises:
        RangeNotSatisfiable: no byte of the file is in the range.
    """
    match = _RANGE.fullmatch(value.strip())
    if match is None or match[0].endswith("=-") or max(len(match[1]), len(match[2])) > _LONGEST_NUMBER:
        return None
    if not match[1]:
        last = int(match[2])
        if last == 0 or size == 0:
            raise RangeNotSatisfiable(value, size)
        return ByteRange(max(size - last, 0), size)
    start = int(match[1])
    stop = min(int(match[2]) + 1, size) if match[2] else size
    if match[2] and int(match[2]) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable(value, size)
    return ByteRange(start, stop)


def any_matches(header: str, etag: str) -> bool:
    """Return whether an `If-None-Match` header names the entity tag. The comparison is weak, as RFC 9110 asks."""
    return header.strip() == "*" or etag in {each.strip().removeprefix("W/") for each in header.split(",")}
