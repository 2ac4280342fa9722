"""A page for each error code, at the address that a problem's `type` names (RFC 9457, section 3.1.1).

The text is that of `docs/errors.md`, which stands beside this module.
"""

import html
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from cloud_api.problems import title
from protocol.errors import HTTP_STATUS, ErrorCode

router = APIRouter(prefix="/problems", include_in_schema=False)

_ROW = re.compile(r"^\| `(\w+)` \| \d{3} \| ([^|]*) \|(?: ([^|]*) \|)?", re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")
_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title} - Cotune</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}</style>
<h1>{title}</h1>
{content}
</html>
"""


@dataclass(frozen=True)
class Explanation:
    """What `docs/errors.md` says of a code: its meaning and, where there is something to do, what."""

    meaning: str
    remedy: str


@cache
def explanations() -> dict[ErrorCode, Explanation]:
    """Return what is said of every code."""
    text = files("cloud_api").joinpath("errors.md").read_text(encoding="utf-8")
    return {
        ErrorCode(code): Explanation(meaning.strip(), remedy.strip()) for code, meaning, remedy in _ROW.findall(text)
    }


@router.get("")
async def list_problems() -> HTMLResponse:
    """Every code with its meaning."""
    items = "".join(
        f'<li><a href="/problems/{code.value}"><code>{code.value}</code></a> {_formatted(each.meaning)}'
        for code, each in explanations().items()
    )
    return _page("Error codes", f"<ul>{items}</ul>")


@router.get("/{code}")
async def show_problem(code: str) -> HTMLResponse:
    """One code."""
    if code not in set(ErrorCode):
        raise HTTPException(404)
    known = ErrorCode(code)
    explanation = explanations()[known]
    remedy = f"<h2>What to do</h2><p>{_formatted(explanation.remedy)}</p>" if explanation.remedy else ""
    facts = f"<p><code>{known.value}</code>, HTTP status {HTTP_STATUS[known]}.</p>"
    more = '<p><a href="/problems">All codes</a> · <a href="/docs">The API</a></p>'
    return _page(title(known), f"{facts}<p>{_formatted(explanation.meaning)}</p>{remedy}{more}")


def _page(heading: str, content: str) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=html.escape(heading), content=content))


def _formatted(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", html.escape(text, quote=False))
