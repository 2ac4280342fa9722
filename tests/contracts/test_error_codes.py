"""Every error code has one HTTP status and one line of documentation."""

import re
from pathlib import Path

from protocol.errors import HTTP_STATUS, ErrorCode

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def test_each_code_is_documented_once_with_the_status_it_travels_under() -> None:
    documented = re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(documented) == sorted((code.value, str(HTTP_STATUS[code])) for code in ErrorCode)
