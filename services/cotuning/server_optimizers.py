"""What the server makes of a round's mean delta: a step of momentum or Adam, with the mean as the negative gradient.

The state between rounds is a plain mapping of tensors, `momentum.<name>` and `variance.<name>`: it is saved like an
adapter, and a step returns a new one, so that a step which is repeated from the same state gives the same result.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cotuning.adapters import AdapterState, require_same_tensors
from cotuning.aggregation import apply_server_update

ServerOptimizer = Literal["sgd", "momentum", "adam"]
MOMENTUM, VARIANCE = "momentum.", "variance."
_STATES: dict[ServerOptimizer, tuple[str, ...]] = {"sgd": (), "momentum": (MOMENTUM,), "adam": (MOMENTUM, VARIANCE)}


def optimizer_step(
    shared: Mapping[str, Tensor],
    mean_delta: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    optimizer: ServerOptimizer = "sgd",
    learning_rate: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> tuple[AdapterState, AdapterState]:
    """theta_{t+1} from theta_t and `Delta_t = sum_i w_i delta_i`. Nothing that is given is changed.

    - `sgd`: `theta + eta Delta`; FedAvg at eta = 1.
    - `momentum` (FedAvgM, arXiv 1909.06335): `m = beta1 m + Delta`, `theta + eta m`; m starts at zero.
    - `adam` (FedAdam, arXiv 2003.00295, algorithm 2): `m = beta1 m + (1 - beta1) Delta`,
      `v = beta2 v + (1 - beta2) Delta^2`, `theta + eta m / (sqrt(v) + tau)`; m starts at zero, v at tau^2. As there,
      without bias correction: tau bounds the first steps instead.

    Args:
        shared: theta_t, float32.
        mean_delta: Delta_t, float32, the same names and shapes.
        state: what the last step returned, or empty before the first.
        optimizer: which of them.
        learning_rate: eta. For `adam` the step of each value is at most about eta, whatever the size of Delta.
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        tau: degree of adaptivity, above zero, in the unit of Delta.

    Returns:
        theta_{t+1} and the state after it; both float32, computed in float64. `sgd` is one float32 addition.

    Raises:
        AdapterMismatch: delta or state do not belong to theta.
    """
    if optimizer == "sgd":
        require_same_tensors("server optimizer's state", {}, state)
        return apply_server_update(shared, mean_delta, learning_rate), {}
    require_same_tensors("delta", shared, mean_delta)
    start = {MOMENTUM: 0.0, VARIANCE: tau**2}
    empty = {
        prefix + name: torch.full_like(tensor, start[prefix])
        for prefix in _STATES[optimizer]
        for name, tensor in shared.items()
    }
    require_same_tensors("server optimizer's state", empty, state or empty)
    before = {name: tensor.double() for name, tensor in (state or empty).items()}
    after: AdapterState = {}
    moved: AdapterState = {}
    for name, tensor in shared.items():
        delta = mean_delta[name].double()
        share = 1.0 if optimizer == "momentum" else 1 - beta1
        momentum = after[MOMENTUM + name] = beta1 * before[MOMENTUM + name] + share * delta
        step = momentum
        if optimizer == "adam":
            variance = beta2 * before[VARIANCE + name] + (1 - beta2) * delta.square()
            after[VARIANCE + name] = variance
            step = momentum / (variance.sqrt() + tau)
        moved[name] = (tensor.double() + learning_rate * step).float()
    return moved, {name: tensor.float() for name, tensor in sorted(after.items())}
