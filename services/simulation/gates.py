"""What must hold before any device trains, so that a gain can be the method's: a teacher worth learning from, a proxy
that carries what it knows, and no row that a model is measured on in what it was trained on.

A gate that fails does not stop anything. It is printed, and the report says what its failure takes away.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pydantic import Field

from cotuning.contamination import Finding, ProtectedRows, text_of
from cotuning.examples import Example
from simulation.errors import MeasurementError
from simulation.scores import Record, RowScores

LEAST_EXACT_MATCH = 10.0
"""Percent; the issue asks for "well above 0" and names no number."""

LEAST_LEAD = 0.3
"""Bits per byte."""

LEAST_KEPT = 0.5
"""Share of the LLM's lead that the proxy keeps."""

_NAMED_ROWS = 5


class Gate(Record):
    """A condition, whether it holds, and the figures that say so."""

    name: str
    passed: bool
    required: str = Field(description="The condition in words, with its limit.")
    measured: str = Field(description="The figures in words.")
    figures: Mapping[str, float | None] = Field(description="The figures by name; null where one is not defined.")
    without_it: str = Field(description="What must not be said where it fails.")


def exact_match_gate(llm: Mapping[str, RowScores], *, least: float = LEAST_EXACT_MATCH) -> Gate:
    """Whether the tuned LLM answers enough rows exactly for answers to show anything.

    Args:
        llm: validation scores of the LLM after tuning on public rows, by set.
        least: percent, of the mean over the sets.

    Raises:
        MeasurementError: no scores.
    """
    _require(llm, "the LLM")
    figures = {name: scores.mean("exact_match") for name, scores in llm.items()}
    mean = sum(figures.values()) / len(figures)
    return Gate(
        name="LLM answers",
        passed=mean >= least,
        required=f"exact match of the tuned LLM at least {least:g} %",
        measured=f"{mean:.1f} % (lowest: {_least(figures, '.1f')})",
        figures={**figures, "mean": mean},
        without_it="the LLM cannot answer these rows: exact match says nothing about what it could teach",
    )


def lead_gate(llm: Mapping[str, RowScores], slms: Mapping[str, RowScores], *, least: float = LEAST_LEAD) -> Gate:
    """Whether the tuned LLM is ahead of every device's SLM on the device's own rows.

    Args:
        llm: validation scores of the LLM after tuning on public rows, by device.
        slms: those of the devices' models before any training, on the same rows.
        least: bits per byte, for every device.

    Raises:
        MeasurementError: no scores, other devices, or other rows.
    """
    figures = _leads(llm, slms, "the LLM")
    return Gate(
        name="LLM leads",
        passed=min(figures.values()) >= least,
        required=f"tuned LLM at least {least:g} bits per byte better than each SLM",
        measured=f"lowest: {_least(figures, '.3f')}",
        figures=figures,
        without_it="the teacher is hardly better than its students: a gain is not shown to be what it taught",
    )


def proxy_gate(
    llm: Mapping[str, RowScores],
    proxy: Mapping[str, RowScores],
    slms: Mapping[str, RowScores],
    *,
    least: float = LEAST_KEPT,
) -> Gate:
    """How much of the LLM's lead over the SLMs the proxy keeps after distillation.

    Args:
        llm: as in `lead_gate`.
        proxy: validation scores of the distilled proxy, by device.
        slms: as in `lead_gate`.
        least: share, of the leads' sums over the devices.

    Raises:
        MeasurementError: as in `lead_gate`.
    """
    whole, kept = _leads(llm, slms, "the LLM"), _leads(proxy, slms, "the proxy")
    figures: dict[str, float | None] = {
        device: kept[device] / lead if lead > 0 else None for device, lead in whole.items()
    }
    lead = sum(whole.values())
    share = sum(kept.values()) / lead if lead > 0 else None
    told = f"{share:.0%} of {lead / len(whole):.3f} bits per byte" if share is not None else "the LLM has no lead"
    return Gate(
        name="proxy keeps the lead",
        passed=share is not None and share >= least,
        required=f"proxy keeps at least {least:.0%} of the LLM's lead",
        measured=told,
        figures={**figures, "all devices": share},
        without_it="what crosses the network hardly knows what the LLM knows: the LLM's knowledge is not what helps",
    )


def contamination_gate(
    protected: Sequence[Example],
    texts: Mapping[str, Sequence[str]],
    *,
    on_text: Callable[[str, int, int], None] | None = None,
) -> Gate:
    """Whether any text that a model is trained on holds a private, validation or test row (`cotuning.contamination`).

    Args:
        protected: the rows, with ids that say where they are (`assets.data_folders.protected_rows`).
        texts: source -> what is trained on: a corpus's documents, public rows as `contamination.text_of` gives them.
        on_text: told the source, and how many of how many texts are searched; may raise to stop.

    Raises:
        MeasurementError: nothing to protect or nothing to search: an empty search proves nothing.
    """
    if not protected or not texts:
        raise MeasurementError(f"expected rows to protect and texts to search, got {len(protected)} and {len(texts)}")
    rows = ProtectedRows(protected)
    figures: dict[str, float | None] = {"protected rows": len(protected)}
    held: Counter[str] = Counter()
    for source, found in texts.items():

        def tell(done: int, total: int, source: str = source) -> None:
            if on_text is not None:
                on_text(source, done, total)

        findings = list(rows.find_all(found, tell))
        figures |= {f"{source}: texts": len(found), f"{source}: texts with a row": len(findings)}
        held.update(f"{each.row} in {source}" for each in findings)
    total = sum(held.values())
    named = f": {', '.join(sorted(held)[:_NAMED_ROWS])}{' and others' if len(held) > _NAMED_ROWS else ''}"
    return Gate(
        name="nothing seen before",
        passed=not total,
        required="no private, validation or test row in a pretraining corpus or public set",
        measured=f"{total} of {sum(map(len, texts.values()))} texts hold one{named if total else ''}",
        figures=figures,
        without_it="models may repeat rows that they have read: no figure here is a measurement",
    )


def without_protected(
    protected: Sequence[Example], rows: Sequence[Example]
) -> tuple[list[Example], list[tuple[Example, Finding]]]:
    """Public rows that hold no protected row, and those that do, each with what was found in it.

    Args:
        protected: as in `contamination_gate`, which passes on what is kept.
        rows: what is to be trained on.

    Returns:
        What is kept, in order; and what is left out, for the report to say.
    """
    searched = ProtectedRows(protected)
    found = {finding.place: finding for finding in searched.find_all([text_of(row) for row in rows])}
    kept = [row for place, row in enumerate(rows) if place not in found]
    return kept, [(rows[place], finding) for place, finding in found.items()]


def _leads(better: Mapping[str, RowScores], slms: Mapping[str, RowScores], name: str) -> dict[str, float]:
    """Bits per byte by which `better` is ahead, by device."""
    _require(slms, "the SLMs")
    if odd := sorted(better.keys() ^ slms.keys()):
        raise MeasurementError(f"expected scores of {name} and of the SLM for the same devices, got one for {odd}")
    if other := [device for device in slms if better[device].digest != slms[device].digest]:
        raise MeasurementError(f"expected {name} and the SLM on the same rows, got others for {', '.join(other)}")
    return {device: slms[device].mean("bits_per_byte") - better[device].mean("bits_per_byte") for device in slms}


def _require(scores: Mapping[str, RowScores], name: str) -> None:
    if not scores:
        raise MeasurementError(f"expected scores of {name}, got none")


def _least(figures: Mapping[str, float], form: str) -> str:
    name = min(figures, key=lambda each: (figures[each], each))
    return f"{figures[name]:{form}}, {name}"
