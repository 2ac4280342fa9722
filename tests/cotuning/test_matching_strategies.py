"""Every matching as a setting of Co-PLMs, through the device's and the server's steps."""

import math

import pytest
from pydantic import ValidationError

from protocol.strategies import CoPlmsSettings
from tests.cotuning.strategy_inputs import same
from tests.cotuning.test_strategies import World, settings

TERMS = {
    "fold": {"kl"},
    "ce_only": set(),
    "uld": {"uld"},
    "gold": {"gold"},
    "mined_dtw": {"mined", "mined_share"},
    "alm": {"alm"},
}


@pytest.mark.parametrize("matching", TERMS)
def test_a_device_and_the_server_learn_by_each_matching(matching: str) -> None:
    world = World("bloom")
    chosen = settings(matching=matching)
    device = world.device(settings=chosen)
    names = {"ce", *TERMS[matching]}
    assert set(device.losses) == {"domain_ce", *(f"{party}_{name}" for party in ("slm", "proxy") for name in names)}
    server = world.server(settings=chosen)
    assert set(server.losses) == {f"{party}_{name}" for party in ("llm", "proxy") for name in names}
    assert all(math.isfinite(value) for value in [*device.losses.values(), *server.losses.values()])
    if matching != "ce_only":
        alone = settings(matching="ce_only")
        assert not same(device.delta, world.device(settings=alone).delta)
        assert not same(server.shared_adapter, world.server(settings=alone).shared_adapter)


def test_without_a_choice_it_is_the_fold() -> None:
    world = World()
    assert same(world.device().delta, world.device(settings=settings(matching="fold")).delta)


def test_with_ce_only_no_device_teaches_the_server() -> None:
    world = World()
    payload = world.parse(world.device())
    taught = world.server(device_logits=[payload], settings=settings(matching="ce_only"))
    untaught = world.server(settings=settings(matching="ce_only"))
    assert set(taught.losses) == {"llm_ce", "proxy_ce"}
    assert same(taught.shared_adapter, untaught.shared_adapter)


def test_the_likelihood_term_reaches_both_steps() -> None:
    world = World("bloom")
    chosen = settings(span_likelihood_weight=0.2)
    assert {"slm_span_likelihood", "proxy_span_likelihood"} <= set(world.device(settings=chosen).losses)
    assert {"llm_span_likelihood", "proxy_span_likelihood"} <= set(world.server(settings=chosen).losses)


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match="matching"):
        CoPlmsSettings(matching="dtw")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"expected span_likelihood_weight 0.*got 0\.1 beside 'alm'"):
        CoPlmsSettings(matching="alm", span_likelihood_weight=0.1)
    assert CoPlmsSettings().matching == "fold"
