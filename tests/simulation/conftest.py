"""One world for all tests of the simulator; none changes it."""

import pytest

from tests.simulation.tiny_world import World, build


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))
