"""Which bytes a `Range` header names, against a slow reading of RFC 9110."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_api.artifacts.ranges import ByteRange, RangeNotSatisfiable, any_matches, parse_range


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("bytes=0-", 10, ByteRange(0, 10)),
        ("bytes=3-5", 10, ByteRange(3, 6)),
        ("bytes=9-", 10, ByteRange(9, 10)),
        ("bytes=3-99", 10, ByteRange(3, 10)),
        ("bytes=-4", 10, ByteRange(6, 10)),
        ("bytes=-99", 10, ByteRange(0, 10)),
        ("BYTES=0-0", 10, ByteRange(0, 1)),
        ("bytes=5-3", 10, None),
        ("bytes=-", 10, None),
        ("bytes=0-1,4-5", 10, None),
        ("lines=0-1", 10, None),
        ("bytes=a-b", 10, None),
        ("bytes= 1-2", 10, None),
        ("bytes=" + "9" * 5000 + "-", 10, None),
    ],
)
def test_examples(header: str, size: int, expected: ByteRange | None) -> None:
    assert parse_range(header, size) == expected


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=0-", 0), ("bytes=-0", 10), ("bytes=-1", 0)])
def test_a_range_outside_the_file(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range(header, size)
    assert caught.value.headers == {"Content-Range": f"bytes */{size}"}


@given(first=st.integers(0, 40), last=st.integers(0, 40), size=st.integers(1, 30))
def test_a_range_names_the_bytes_from_first_to_last(first: int, last: int, size: int) -> None:
    named = [position for position in range(size) if first <= position <= last]
    if last < first:
        assert parse_range(f"bytes={first}-{last}", size) is None
    elif not named:
        with pytest.raises(RangeNotSatisfiable):
            parse_range(f"bytes={first}-{last}", size)
    else:
        part = parse_range(f"bytes={first}-{last}", size)
        assert part is not None
        assert list(range(part.start, part.stop)) == named


@given(st.text(max_size=20), st.integers(0, 30))
def test_any_text_is_a_range_inside_the_file_or_none(text: str, size: int) -> None:
    try:
        part = parse_range(f"bytes={text}", size)
    except RangeNotSatisfiable:
        return
    assert part is None or 0 <= part.start < part.stop <= size


def test_entity_tags() -> None:
    assert any_matches('"a", W/"b"', '"b"')
    assert any_matches(" * ", '"b"')
    assert not any_matches('"a"', '"b"')
    assert not any_matches("b", '"b"')
