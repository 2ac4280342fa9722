"""What the method is held to, and whether it was reached: met, not met, or not measured, never nothing.

The limits of the gain over earlier methods are what Co-PLMs reports (arXiv 2511.11678): +5.38 % Rouge-L and +4.88 %
exact match over the best of them.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field

from simulation.scores import METRIC_NAMES, Metric, Record
from simulation.statistics import Comparison, Interval

LEAST_GAINS: Mapping[Metric, float] = {"rouge_l": 0.0538, "exact_match": 0.0488}
MOST_BYTES_OF_PEER = 1.0
MOST_BYTES_OF_FULL_MODELS = 0.02


class Wanted(Record):
    """Which strategies the targets are about; names that were not run leave their targets unmeasured."""

    method: str = "co_plms"
    baselines: tuple[str, ...] = ("standalone", "fed_lora", "fedcollm", "fedmkt")
    controls: tuple[str, ...] = Field(
        default=("uninformed_proxy", "standalone_equal_cpu"), description="What a gain must exceed."
    )
    public_only: str = Field(default="llm_public", description="The LLM on public rows alone for the same steps.")
    hidden_sets: tuple[str, ...] = Field(default=(), description="Sets of rows whose domains only devices hold.")
    bytes_peer: str = "fedcollm"
    full_model_bytes: float | None = Field(
        default=None, gt=0, description="What full-model FedAvg sends for a device in a round, both ways."
    )


class Target(Record):
    """One line of what was aimed at."""

    measure: str
    required: str
    measured: str
    value: Interval | None = Field(description="Null where it was not measured.")
    met: bool | None = Field(description="Null where it was not measured.")


def targets(
    wanted: Wanted,
    *,
    comparisons: Sequence[Comparison],
    over_best: Sequence[Comparison],
    cloud: Sequence[Comparison],
    bytes_each: Mapping[str, float | None],
) -> list[Target]:
    """Every target, in the order in which the report shows them.

    Args:
        wanted: which strategies.
        comparisons: the method against each other strategy, on the devices' own rows.
        over_best: those against the best baseline of each metric.
        cloud: the LLM after the method against the LLM on public rows alone.
        bytes_each: bytes of one device in one round by strategy.
    """
    found = []
    run = [name for name in wanted.baselines if any(each.theirs == name for each in comparisons)]
    against = f"the best of {', '.join(run or wanted.baselines)}"
    for metric, least in LEAST_GAINS.items():
        chosen = next((each for each in over_best if each.metric == metric), None)
        found.append(_gain(f"{wanted.method} over {against}: {METRIC_NAMES[metric]}", chosen, least))
    for metric in ("rouge_l", "bits_per_byte"):
        chosen = next((each for each in cloud if each.metric == metric), None)
        found.append(_gain(f"LLM on device-only domains over {wanted.public_only}: {METRIC_NAMES[metric]}", chosen))
    found += _byte_targets(wanted, comparisons, bytes_each)
    for control in wanted.controls:
        for metric in LEAST_GAINS:
            chosen = next((each for each in comparisons if each.theirs == control and each.metric == metric), None)
            found.append(_gain(f"{wanted.method} over the control {control}: {METRIC_NAMES[metric]}", chosen))
    return found


def _gain(measure: str, chosen: Comparison | None, least: float | None = None) -> Target:
    """A relative gain with its whole interval above 0 and, where given, a least value."""
    required = "interval above 0" if least is None else f"at least {least:+.2%}, interval above 0"
    if chosen is None:
        return Target(measure=measure, required=required, measured="not measured", value=None, met=None)
    gain = chosen.relative
    # A baseline of 0 has no relative gain: any difference is then infinitely many percent of it.
    judged = gain if gain.low is not None else chosen.difference
    met = judged.above_zero and (least is None or gain.value is None or gain.value >= least)
    scores = f"{chosen.our_score:.4g} against {chosen.their_score:.4g} ({chosen.theirs})"
    return Target(measure=measure, required=required, measured=f"{gain_text(chosen)}; {scores}", value=judged, met=met)


def gain_text(comparison: Comparison) -> str:
    """The relative gain with its interval, or the difference where there is no relative gain."""
    gain, points = comparison.relative, comparison.difference
    if gain.value is not None and gain.low is not None and gain.high is not None:
        return f"{gain.value:+.2%} ({gain.low:+.2%} to {gain.high:+.2%})"
    if points.value is not None and points.low is not None and points.high is not None:
        told = f"{points.value:+.4g} ({points.low:+.4g} to {points.high:+.4g})"
        return f"{told}, no percentage of {comparison.their_score:g}"
    return "no interval"


def _byte_targets(
    wanted: Wanted, comparisons: Sequence[Comparison], bytes_each: Mapping[str, float | None]
) -> list[Target]:
    own, peer = bytes_each.get(wanted.method), bytes_each.get(wanted.bytes_peer)
    quality = [each for each in comparisons if each.theirs == wanted.bytes_peer and each.metric in LEAST_GAINS]
    not_worse = bool(quality) and all((each.difference.value or 0.0) >= 0 for each in quality)
    told = "equal or better quality by the means" if not_worse else "a worse mean Rouge-L or exact match"
    first = _ratio(f"bytes a device and round against {wanted.bytes_peer}", own, peer, MOST_BYTES_OF_PEER)
    if first.met is not None:
        measured, met = f"{first.measured}, at {told}", first.met and not_worse
        required = f"{first.required} at equal or better quality"
        first = first.model_copy(update={"measured": measured, "met": met, "required": required})
    second = _ratio(
        "bytes a device and round against full-model FedAvg", own, wanted.full_model_bytes, MOST_BYTES_OF_FULL_MODELS
    )
    return [first, second]


def _ratio(measure: str, own: float | None, other: float | None, most: float) -> Target:
    required = f"at most {most:g}x"
    if own is None or not other:
        return Target(measure=measure, required=required, measured="not measured", value=None, met=None)
    ratio = own / other
    return Target(
        measure=measure,
        required=required,
        measured=f"{ratio:.3f}x ({own:,.0f} against {other:,.0f})",
        value=Interval(value=ratio, low=None, high=None),
        met=ratio <= most,
    )
