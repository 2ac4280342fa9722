import pytest

from cotuning.contamination import text_of
from cotuning.examples import Example
from simulation.errors import MeasurementError
from simulation.gates import contamination_gate, exact_match_gate, lead_gate, proxy_gate, without_protected
from simulation.scores import RowScores
from tests.simulation.observations import scores_of


def bits(value: float, rows: str = "phone") -> RowScores:
    """Two rows with so many bits per byte."""
    return scores_of([100 * (2 - value)] * 2, rows)


def test_exact_match_of_the_llm() -> None:
    llm = {"phone": scores_of([60, 10, 10, 10]), "laptop": scores_of([10, 10])}
    found = exact_match_gate(llm)
    assert found.passed
    assert found.figures == {"phone": 25.0, "laptop": 0.0, "mean": 12.5}
    assert found.measured == "12.5 % (lowest: 0.0, laptop)"
    assert not exact_match_gate(llm, least=12.6).passed
    with pytest.raises(MeasurementError, match="scores of the LLM, got none"):
        exact_match_gate({})


def test_the_lead_holds_for_every_device() -> None:
    llm = {"phone": bits(1.0), "laptop": bits(1.5, "laptop")}
    slms = {"phone": bits(1.5), "laptop": bits(1.75, "laptop")}
    found = lead_gate(llm, slms)
    assert not found.passed
    assert found.figures == {"phone": pytest.approx(0.5), "laptop": pytest.approx(0.25)}
    assert found.measured == "lowest: 0.250, laptop"
    assert lead_gate(llm, slms, least=0.25).passed


def test_the_proxys_share_of_the_lead() -> None:
    llm = {"phone": bits(1.0), "laptop": bits(1.5, "laptop")}
    slms = {"phone": bits(1.5), "laptop": bits(1.75, "laptop")}
    proxy = {"phone": bits(1.25), "laptop": bits(1.5, "laptop")}
    found = proxy_gate(llm, proxy, slms)
    assert found.passed
    assert found.figures == {
        "phone": pytest.approx(0.5),
        "laptop": pytest.approx(1.0),
        "all devices": pytest.approx(0.5 / 0.75),
    }
    assert found.measured == "67% of 0.375 bits per byte"
    assert not proxy_gate(llm, slms, slms).passed
    assert not proxy_gate(llm, proxy, slms, least=0.7).passed


def test_without_a_lead_there_is_nothing_to_keep() -> None:
    even = {"phone": bits(1.5)}
    found = proxy_gate(even, {"phone": bits(1.0)}, even)
    assert not found.passed
    assert found.figures == {"phone": None, "all devices": None}
    assert found.measured == "the LLM has no lead"


def test_leads_are_of_the_same_devices_and_rows() -> None:
    with pytest.raises(MeasurementError, match=r"for the same devices, got one for \['laptop'\]"):
        lead_gate({"phone": bits(1.0)}, {"phone": bits(1.5), "laptop": bits(1.5, "laptop")})
    with pytest.raises(MeasurementError, match="on the same rows, got others for phone"):
        lead_gate({"phone": bits(1.0, "other")}, {"phone": bits(1.5)})
    with pytest.raises(MeasurementError, match="scores of the SLMs, got none"):
        lead_gate({}, {})


def test_a_row_in_what_is_trained_on_is_found_and_named() -> None:
    protected = [
        Example("code/test:7", "Say it.", "the quick brown fox jumps over", "the lazy dog"),
        Example("code/train:2", "Say it.", "nothing of the kind is here at all", "really"),
    ]
    seen: list[tuple[str, int, int]] = []
    texts = {
        "corpus": ["Other words.", "The quick brown fox jumps over the lazy dog!"],
        "public rows": ["a row"],
    }
    found = contamination_gate(protected, texts, on_text=lambda *told: seen.append(told))
    assert not found.passed
    assert found.measured == "1 of 3 texts hold one: code/test:7 in corpus"
    assert found.figures == {
        "protected rows": 2,
        "corpus: texts": 2,
        "corpus: texts with a row": 1,
        "public rows: texts": 1,
        "public rows: texts with a row": 0,
    }
    assert seen[0] == ("corpus", 0, 2)
    assert seen[-1] == ("public rows", 1, 1)
    assert contamination_gate(protected, {"corpus": ["Other words."]}).passed


def test_rows_that_hold_a_protected_one_are_left_out_and_told() -> None:
    protected = [Example("code/test:7", "Say it.", "the quick brown fox jumps over", "the lazy dog")]
    public = [
        Example("public-1", "Name a colour.", "the sky", "blue"),
        Example("public-2", "Repeat.", "The quick brown fox jumps over", "the lazy dog."),
    ]
    kept, left_out = without_protected(protected, public)
    assert kept == public[:1]
    assert [(row.id, finding.row, finding.kind) for row, finding in left_out] == [("public-2", "code/test:7", "whole")]
    assert contamination_gate(protected, {"public": [text_of(row) for row in kept]}).passed


@pytest.mark.parametrize(("protected", "texts"), [([], {"corpus": ["x"]}), ([Example("a", "b", "", "c")], {})])
def test_an_empty_search_proves_nothing(protected: list[Example], texts: dict) -> None:
    with pytest.raises(MeasurementError, match="rows to protect and texts to search"):
        contamination_gate(protected, texts)
