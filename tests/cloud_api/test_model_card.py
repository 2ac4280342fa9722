"""What a model card says of versions that are not the ones to use, and that its settings name no device."""

from cloud_api.runs.examples import RUN, TRAFFIC
from cloud_api.versions.examples import VERSION
from cloud_api.versions.model_card import CardFacts, model_card
from persistence.versions import Contributions

START = VERSION.model_copy(update={"number": 0, "metrics": {}})


def card(**changed: object) -> str:
    version = VERSION.model_copy(update=changed)
    run = RUN.model_copy(update={"config": RUN.config.model_copy(update={"device_ids": ["dev_secret"]})})
    return model_card(CardFacts(run, version, START, Contributions(3, 7, 120), TRAFFIC))


def test_a_promoted_version() -> None:
    text = card()
    assert "It was promoted." in text
    assert "| 1 | 0 | 1, attempt 1 | 3 | 0 |" in text
    assert "| up | adapter_delta | 1048576 |" in text
    assert "- Private rows: 120 on 3 devices" in text
    assert "- Updates: 7 over all rounds above." in text
    assert "dev_secret" not in text
    assert "## Scores" not in text  # version 0 was not measured here, so there is no before


def test_a_version_that_was_not_promoted_or_was_withdrawn_says_so_first() -> None:
    assert "It was **not promoted**" in card(promoted=False)
    withdrawn = card(withdrawn_at=VERSION.created_at, withdrawn_reason="rolled back to version 0: it repeats itself")
    assert "withdrawn on 2026-03-01: rolled back to version 0: it repeats itself." in withdrawn
