"""Devices that train the shared adapter at a rank of their own (HetLoRA, arXiv 2401.06432): what they start from.

A device of rank k runs the same strategy with `proxy_lora.rank` k, on theta's first k components; `product_mean` says
what the server makes of its delta, and why only the server may order the components.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.product_mean import at_rank, by_singular_values, resized
from protocol.strategies import CoPlmsSettings


@dataclass(frozen=True)
class DeviceStart:
    """What `co_plms.device_step` starts from; the delta that it returns is relative to this theta."""

    settings: CoPlmsSettings
    shared_adapter: Mapping[str, Tensor]
    domain_adapter: Mapping[str, Tensor] | None


def device_start(
    settings: CoPlmsSettings,
    rank: int | None,
    shared_adapter: Mapping[str, Tensor],
    domain_adapter: Mapping[str, Tensor] | None,
    *,
    seed: int,
) -> DeviceStart:
    """Cut theta to a device's rank.

    Args:
        settings: the run's.
        rank: of the assignment; None: the run's own, nothing is cut.
        shared_adapter: theta_t as published.
        domain_adapter: phi_i after the last round, None in the first. Where it was trained at another rank (the owner
            has declared a new one since) its greatest components are kept, or fresh ones added whose product is zero.
        seed: the run's; of fresh components.

    Raises:
        ValueError: an adapter is no LoRA adapter, or a rank above the run's.
    """
    full = settings.proxy_lora.rank
    if rank is not None and not 1 <= rank <= full:
        raise ValueError(f"expected a rank in 1..{full}, got {rank}")
    if settings.device_ranks == "uniform":
        return DeviceStart(settings, shared_adapter, domain_adapter)
    own = full if rank is None else rank
    return DeviceStart(
        settings.model_copy(update={"proxy_lora": settings.proxy_lora.model_copy(update={"rank": own})}),
        at_rank(shared_adapter, own, seed=seed),
        None if domain_adapter is None else resized(domain_adapter, own, seed=seed),
    )


def for_devices(theta: AdapterState, settings: CoPlmsSettings) -> AdapterState:
    """theta as it is published: where devices cut it to their rank, its first components are the greatest."""
    return theta if settings.device_ranks == "uniform" else by_singular_values(theta)
