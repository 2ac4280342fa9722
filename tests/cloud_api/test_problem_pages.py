"""The page that a problem's `type` leads to."""

from cloud_api.problem_pages import explanations
from protocol.errors import ErrorCode
from tests.cloud_api.running_api import RunningApi


def test_every_code_has_a_page_at_the_type_of_its_problem(api: RunningApi) -> None:
    client = api.client(None)
    assert set(explanations()) == set(ErrorCode)
    for code, explanation in explanations().items():
        assert explanation.meaning, code
        page = client.get(f"/problems/{code.value}")
        assert page.status_code == 200
        assert page.headers["Content-Type"].startswith("text/html")
        assert f"<code>{code.value}</code>" in page.text
    refused = client.get("/v1/runs").json()
    assert "Operators" in client.get(refused["type"]).text


def test_the_list_links_every_page_and_an_unknown_code_has_none(api: RunningApi) -> None:
    client = api.client(None)
    listed = client.get("/problems").text
    assert all(f'href="/problems/{code.value}"' in listed for code in ErrorCode)
    assert client.get("/problems/nonsense").status_code == 404
