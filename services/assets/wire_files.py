"""Adapters and devices' updates as the files that travel: one form for whoever writes them."""

from collections.abc import Collection, Mapping

from torch import Tensor

from assets.tensors import tensors_to_bytes
from cotuning.strategies.results import DeviceResult
from protocol.headers import ADAPTER_FORMAT, METADATA_BASE, METADATA_FORMAT, METADATA_PROBE_SET, METADATA_PROXY
from protocol.statuses import PartKind


def adapter_file(state: Mapping[str, Tensor], *, model_sha256: str | None) -> bytes:
    """theta or omega as a file; equal values give the same bytes.

    Args:
        state: the adapter.
        model_sha256: the manifest of the run's shared small model, which the file names; None where it has none.
    """
    model = {} if model_sha256 is None else {METADATA_PROXY: model_sha256}
    return tensors_to_bytes(state, {METADATA_FORMAT: ADAPTER_FORMAT} | model)


def update_files(
    result: DeviceResult,
    uploads: Collection[PartKind],
    *,
    model_sha256: str | None,
    adapter_sha256: str | None,
    probe_set_sha256: str | None,
) -> dict[PartKind, bytes]:
    """What will leave a device: the parts that the strategy declares, and nothing else of the result.

    Each says in its header which files of the round it belongs to.

    Args:
        result: of the device's step.
        uploads: the spec's.
        model_sha256: as in `adapter_file`.
        adapter_sha256: theta_t, as the device received it.
        probe_set_sha256: the rows that logits are of.
    """
    model = {METADATA_PROXY: model_sha256} if model_sha256 else {}
    base = {METADATA_BASE: adapter_sha256} if adapter_sha256 else {}
    probe = {METADATA_PROBE_SET: probe_set_sha256} if probe_set_sha256 else {}
    parts = {
        PartKind.ADAPTER_DELTA: (result.delta, {METADATA_FORMAT: ADAPTER_FORMAT} | base | model),
        PartKind.LOGITS: (result.logits, result.logits_metadata | probe | model),
    }
    return {kind: tensors_to_bytes(*part) for kind, part in parts.items() if kind in uploads}
