"""The cache: resumes, verifies, and gives a wrong file no name."""

import hashlib
import json
from pathlib import Path

import pytest

from edge_agent.cache import ArtifactCache
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent
from edge_agent.errors import CannotTrain, CloudRefused
from protocol.assignments import ArtifactRef
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud, cut, ignoring_range, problem, truncated

CONTENT = bytes(range(256)) * 4000


def test_a_download_goes_on_where_it_was_cut(agent: Agent, client: CloudClient, cloud: FakeCloud) -> None:
    artifact = cloud.add_artifact(CONTENT)
    cloud.fail("artifacts", truncated(300_000))
    cloud.fail("artifacts", cut)
    path = agent.cache.fetch(client, artifact)
    assert path.read_bytes() == CONTENT
    first, second, third = cloud.requests("artifacts")
    assert "range" not in first.headers
    assert second.headers["range"] == third.headers["range"]
    assert 0 < int(second.headers["range"].removeprefix("bytes=").removesuffix("-")) <= 300_000
    assert second.headers["if-range"] == f'"{artifact.sha256}"'


def test_a_server_that_ignores_the_range_is_understood(agent: Agent, client: CloudClient, cloud: FakeCloud) -> None:
    artifact = cloud.add_artifact(CONTENT)
    cloud.fail("artifacts", truncated(300_000))
    cloud.fail("artifacts", ignoring_range)
    assert agent.cache.fetch(client, artifact).read_bytes() == CONTENT


def test_a_restart_goes_on_with_the_partial_file_and_the_second_use_asks_nobody(
    agent: Agent, client: CloudClient, cloud: FakeCloud, tmp_path: Path
) -> None:
    artifact = cloud.add_artifact(CONTENT)
    (tmp_path / "cache" / "files" / f"{artifact.sha256}.part").write_bytes(CONTENT[:1000])
    fresh = ArtifactCache(tmp_path / "cache", agent.retrier.call)
    assert fresh.fetch(client, artifact).read_bytes() == CONTENT
    assert fresh.fetch(client, artifact).read_bytes() == CONTENT
    assert [one.headers["range"] for one in cloud.requests("artifacts")] == ["bytes=1000-"]


def test_wrong_bytes_are_fetched_again_and_given_up_after_three_times(
    agent: Agent, client: CloudClient, cloud: FakeCloud, tmp_path: Path
) -> None:
    artifact = cloud.add_artifact(CONTENT)
    (tmp_path / "cache" / "files" / f"{artifact.sha256}.part").write_bytes(b"?" * 1000)
    assert agent.cache.fetch(client, artifact).read_bytes() == CONTENT

    wrong = ArtifactRef(sha256=hashlib.sha256(b"other").hexdigest(), size_bytes=len(CONTENT))
    cloud.artifacts[wrong.sha256] = CONTENT
    with pytest.raises(CannotTrain, match="came 3 times"):
        agent.cache.fetch(client, wrong)
    assert not (tmp_path / "cache" / "files" / wrong.sha256).exists()


def test_a_file_that_rotted_on_disk_is_fetched_again(
    agent: Agent, client: CloudClient, cloud: FakeCloud, tmp_path: Path
) -> None:
    artifact = cloud.add_artifact(CONTENT)
    agent.cache.fetch(client, artifact).write_bytes(b"rot")
    assert ArtifactCache(tmp_path / "cache", agent.retrier.call).fetch(client, artifact).read_bytes() == CONTENT


def test_a_missing_artifact_is_a_refusal(agent: Agent, client: CloudClient, cloud: FakeCloud) -> None:
    artifact = cloud.add_artifact(CONTENT)
    cloud.fail("artifacts", problem(404, "artifact_not_found"))
    with pytest.raises(CloudRefused):
        agent.cache.fetch(client, artifact)


def test_a_model_folder_is_put_together_once(agent: Agent, client: CloudClient, cloud: FakeCloud) -> None:
    manifest = make_assignment(cloud).proxy_manifest
    assert manifest is not None
    folder = agent.cache.fetch_model(client, manifest)
    assert (folder / "config.json").read_bytes() == b'{"model_type": "llama"}'
    requests = len(cloud.received)
    assert agent.cache.fetch_model(client, manifest) == folder
    assert len(cloud.received) == requests


@pytest.mark.parametrize("name", ["model.bin", "weights.pkl", "modeling_evil.py", "../agent.toml", "a/b.json", ".env"])
def test_a_manifest_with_pickle_code_or_paths_is_refused(
    agent: Agent, client: CloudClient, cloud: FakeCloud, name: str
) -> None:
    file = cloud.add_artifact(b"x")
    content = f'{{"files": [{{"path": "{name}", "sha256": "{file.sha256}", "size_bytes": 1}}]}}'
    with pytest.raises(CannotTrain, match="manifest"):
        agent.cache.fetch_model(client, cloud.add_artifact(content.encode()))
    assert not cloud.requests(f"artifacts/{file.sha256}")


def test_a_manifest_that_names_a_file_twice_is_refused_and_harms_no_cached_file(
    agent: Agent, client: CloudClient, cloud: FakeCloud
) -> None:
    one, other = cloud.add_artifact(b"one"), cloud.add_artifact(b"other")
    kept = agent.cache.fetch(client, one)
    files = [
        {"path": name, "sha256": artifact.sha256, "size_bytes": artifact.size_bytes}
        for name, artifact in (("config.json", one), ("Config.json", other), ("config.json", other))
    ]
    with pytest.raises(CannotTrain, match="twice"):
        agent.cache.fetch_model(client, cloud.add_artifact(json.dumps({"files": files}).encode()))
    assert kept.read_bytes() == b"one"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"files": [{"path": "' + "a" * 300 + '.json"}]}'])
def test_a_manifest_that_is_too_deep_or_has_too_long_a_name_is_malformed(
    agent: Agent, client: CloudClient, cloud: FakeCloud, content: str
) -> None:
    with pytest.raises(CannotTrain, match="malformed"):
        agent.cache.fetch_model(client, cloud.add_artifact(content.encode()))
