"""A round's updates to the next shared adapter, as the run's settings say: theta_t to theta_bar (METHOD step 4)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.aggregation import StreamingMean
from cotuning.product_mean import ProductMean
from cotuning.server_optimizers import optimizer_step
from protocol.strategies import AveragingSettings


@dataclass(frozen=True)
class Aggregate:
    """What a round's updates make.

    Attributes:
        adapter: theta_bar.
        optimizer_state: of the server's optimizer after this round; empty where it has none.
        errors: what re-factoring lost, as shares: `relative_error`, `error_bound` and `update_error` of
            `product_mean.Refactored`; empty where nothing was re-factored.
    """

    adapter: AdapterState
    optimizer_state: AdapterState = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class RoundAggregator:
    """Takes a round's updates one by one; memory does not grow with their number.

    Args:
        shared_adapter: theta_t.
        settings: of the strategy.
        optimizer_state: what the round that made theta_t left; empty at the start and where there is none.
    """

    def __init__(
        self,
        shared_adapter: Mapping[str, Tensor],
        settings: AveragingSettings,
        optimizer_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._shared = shared_adapter
        self._settings = settings
        self._state = optimizer_state or {}
        self._mean: StreamingMean | ProductMean
        if settings.aggregation == "fedavg":
            self._mean = StreamingMean(shared_adapter, max_norm=settings.max_update_norm)
        else:
            self._mean = ProductMean(shared_adapter, max_norm=settings.max_update_norm)

    def add(self, delta: Mapping[str, Tensor], weight: float, *, rank: int | None = None) -> float:
        """Count an update and return its L2 norm. One that is refused leaves no trace.

        Args:
            delta: float32, CPU.
            weight: above zero; the number of examples.
            rank: at which the device was to train; None: theta's. Factors apart (`fedavg`) have no other.

        Raises:
            UpdateRefused: it does not fit, is not finite, or is too large.
            ValueError: the weight is not a positive finite number.
        """
        if isinstance(self._mean, ProductMean):
            return self._mean.add(delta, weight, rank=rank)
        return self._mean.add(delta, weight)

    def result(self) -> Aggregate:
        """Raises ValueError where no update was counted, AdapterMismatch where the state is of another adapter."""
        rate = self._settings.server_learning_rate
        if isinstance(self._mean, ProductMean):
            made = self._mean.result(rate)
            errors = {
                "relative_error": made.relative_error,
                "error_bound": made.error_bound,
                "update_error": made.update_error,
            }
            return Aggregate(made.adapter, errors=errors)
        optimizer = self._settings.server_optimizer
        adapter, state = optimizer_step(
            self._shared,
            self._mean.result(),
            self._state,
            optimizer=optimizer.name,
            learning_rate=rate,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            tau=optimizer.tau,
        )
        return Aggregate(adapter, state)
