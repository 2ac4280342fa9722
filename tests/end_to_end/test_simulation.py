"""A simulation and a deployment over HTTP with the same seed give the same adapters, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.simulated import assert_equal_bits, assert_learns, deployed, simulated
from tests.end_to_end.small_cloud import SmallCloud


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"server_optimizer": {"name": "momentum"}, "public_fraction": 0.25}, id="momentum"),
    ],
)
def test_co_plms_with_three_small_models(cloud: SmallCloud, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = cloud.run_config("equal", seed=7)
    config["strategy"] |= changes
    config["evaluation"]["tolerance_bits_per_byte"] = 10.0
    over_http, here = deployed(cloud, config), simulated(cloud, config, tmp_path)
    assert_learns(over_http)
    assert_equal_bits(here, over_http)


def test_a_version_that_is_not_promoted_is_none_in_both(cloud: SmallCloud, tmp_path: Path) -> None:
    config = cloud.run_config("worse", seed=8)
    # Steps that ruin the models: every version is worse than the first, and each round starts from that one again.
    config["strategy"]["server"] |= {"llm_learning_rate": 1.0, "proxy_learning_rate": 1.0}
    config["evaluation"]["tolerance_bits_per_byte"] = 0.0
    over_http, here = deployed(cloud, config), simulated(cloud, config, tmp_path)
    run = next(each for each in cloud.client.list_runs() if each.name == "worse")
    assert [each.promoted for each in cloud.client.list_versions(run.run_id)] == [True, False, False]
    assert_equal_bits(here, over_http)
