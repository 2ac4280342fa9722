"""A round's updates become one adapter: which of them count, what each weighs, why the others do not (METHOD step 4).

Updates are read one by one, so memory does not grow with their number. One that is refused leaves no trace in the sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cotuning.aggregation import UpdateRefused, update_norm
from cotuning.norm_gate import unusual_norms
from cotuning.payload import PayloadError
from cotuning.strategies.aggregation import Aggregate
from cotuning.strategies.interface import Aggregator, DeviceMessage, LogitsReader
from protocol.strategies import AveragingSettings, StrategySettings

NORM_OUTLIER, COVERAGE_TOO_LOW, LOGITS_MISMATCH = "norm_outlier", "coverage_too_low", "logits_mismatch"
MESSAGE_MISMATCH, NON_FINITE_VALUES = "message_mismatch", "non_finite_values"
"""Why an update is not counted, in the words of the protocol's error codes, beside those of `UpdateRefused`."""


MessageCheck = Callable[[DeviceMessage], None]
"""Refuses one device's message; raises `ValueError`."""


class NotCounted(ValueError):
    """An update must not be counted, whatever its values: a part of it cannot be read, or it is unlike the others.

    Attributes:
        code: in the words of the protocol's error codes.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True)
class SentUpdate:
    """One device's update, as far as counting it goes; its tensors are read when their turn comes.

    Attributes:
        key: unique in the round.
        num_examples: what the device says.
        coverage: share of its response bytes that it says were aligned; None where nothing was.
        read_delta: gives the delta; may raise `NotCounted`.
        read_logits: gives the logits and their header; likewise.
        read_message: gives the message, None where none came; likewise.
        rank: at which the device was to train; None: the run's.
        discount: by which it weighs less, for being late.
    """

    key: str
    num_examples: int
    coverage: float | None
    read_delta: Callable[[], Mapping[str, Tensor]]
    read_logits: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, str]]]
    read_message: Callable[[], DeviceMessage | None] = lambda: None
    rank: int | None = None
    discount: float = 1.0


@dataclass
class Combined:
    """What became of each update.

    Attributes:
        counted: keys, in order.
        norms: key -> L2 norm of a delta that was added.
        refused: key -> code and reason of one that was not counted.
        aggregate: theta_bar; None where nothing was counted or devices send no deltas.
    """

    counted: list[str] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    aggregate: Aggregate | None = None


def counted_examples(num_examples: int, settings: StrategySettings) -> int:
    """n_i. What a device says of itself cannot be checked, only bounded."""
    averaging = settings.averaging
    return num_examples if averaging is None else min(num_examples, averaging.max_examples)


def combine(
    updates: Sequence[SentUpdate],
    settings: StrategySettings,
    *,
    aggregator: Aggregator | None,
    logits: LogitsReader | None,
    message: MessageCheck | None = None,
    on_update: Callable[[], Any] = lambda: None,
) -> Combined:
    """Check and add up a round's updates, in their order.

    Args:
        updates: of the round.
        settings: of the strategy.
        aggregator: None where devices send no deltas.
        logits: checks logits; None where devices send none.
        message: checks a message; None where devices send none.
        on_update: called before each update is read; what it raises ends it there.
    """
    combined, unusual = Combined(), _unusual(updates, settings.averaging, on_update)
    for update in updates:
        on_update()
        try:
            _require_usual(update, unusual, settings.least_coverage)
            if logits is not None:
                logits(*update.read_logits())
            if message is not None:
                _check_message(update.read_message(), message)
            if aggregator is not None:
                weight = counted_examples(update.num_examples, settings) * update.discount
                combined.norms[update.key] = aggregator.add(update.read_delta(), weight, rank=update.rank)
        except (UpdateRefused, NotCounted) as error:
            combined.refused[update.key] = error.code, str(error)
        except PayloadError as error:
            combined.refused[update.key] = LOGITS_MISMATCH, str(error)
        else:
            combined.counted.append(update.key)
    if aggregator is not None and combined.counted:
        combined.aggregate = aggregator.result()
    return combined


def _check_message(sent: DeviceMessage | None, check: MessageCheck) -> None:
    if sent is None:
        return
    for name, tensor in sorted(sent.tensors.items()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotCounted(NON_FINITE_VALUES, f"expected finite values in the message's tensor {name!r}")
    try:
        check(sent)
    except ValueError as error:
        raise NotCounted(MESSAGE_MISMATCH, str(error)) from error


def _require_usual(update: SentUpdate, unusual: Mapping[str, str], least_coverage: float) -> None:
    if update.key in unusual:
        raise NotCounted(NORM_OUTLIER, unusual[update.key])
    if update.coverage is not None and update.coverage < least_coverage:
        # What was learnt through an alignment that did not work.
        raise NotCounted(
            COVERAGE_TOO_LOW,
            f"expected at least {least_coverage:.2f} of the response bytes inside aligned spans, got "
            f"{update.coverage:.2f}; the tokenizers of this device and of the proxy do not agree on the text",
        )


def _unusual(
    updates: Sequence[SentUpdate], settings: AveragingSettings | None, on_update: Callable[[], Any]
) -> dict[str, str]:
    """Say of which updates the delta's norm is unlike the others', and how.

    It reads every delta once more, as no sum can be begun before the norms are known. What is no usable delta at all
    is left to the sum to refuse, and is no part of the distribution.
    """
    if settings is None or settings.norm_gate == "off" or len(updates) < settings.norm_gate_min_updates:
        return {}
    norms: dict[str, float] = {}
    for update in updates:
        on_update()
        try:
            norm = update_norm(update.read_delta())
        except NotCounted:
            continue
        if norm <= settings.max_update_norm:  # false for NaN
            norms[update.key] = norm
    return unusual_norms(
        norms, most_deviations=settings.norm_gate_deviations, min_updates=settings.norm_gate_min_updates
    )
