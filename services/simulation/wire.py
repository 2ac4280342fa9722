"""What crosses the network, in the form in which it does: each file is written, counted, and read back."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from assets.tensors import read_tensors
from assets.wire_files import adapter_file, update_files
from cotuning.strategies.results import DeviceResult
from protocol.statuses import PartKind
from protocol.strategies import DownloadKind, StrategySpec
from simulation.budget import PREPARATION, Crossing, Meter
from simulation.prepared import Prepared

Part = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and their header."""


def crossing(spec: StrategySpec) -> Crossing:
    """What a strategy declares to cross the network."""
    return Crossing(up=frozenset(spec.uploads), down=frozenset(spec.downloads))


@dataclass
class Wire:
    """The network of one run. Numbers (metrics, assignments) are not counted: they do not grow with the models.

    Attributes:
        folder: where files lie while they travel.
        spec: of the strategy.
        prepared: whose files devices download once.
        meter: counts the bytes.
    """

    folder: Path
    spec: StrategySpec
    prepared: Prepared
    meter: Meter
    _met: set[str] = field(default_factory=set)
    _adapter_sha256: str | None = None

    def publish(self, shared_adapter: Mapping[str, Tensor] | None) -> "Published":
        """theta as devices of this round will read it."""
        if shared_adapter is None:
            self._adapter_sha256 = None
            return Published(None, 0)
        content = adapter_file(shared_adapter, model_sha256=self._model_sha256)
        self._adapter_sha256 = hashlib.sha256(content).hexdigest()
        return Published(self._through("adapter", content)[0], len(content))

    def download(self, device: str, round_number: int, published: "Published") -> None:
        """Count what a device fetches: once what does not change, and theta."""
        small = self.prepared.small
        once = {
            DownloadKind.PROXY_BASE: small.num_bytes if small is not None else 0,
            DownloadKind.MODEL_MANIFEST: small.manifest_bytes if small is not None else 0,
            DownloadKind.PROBE_SET: self.prepared.probe_bytes,
        }
        if device not in self._met:
            self._met.add(device)
            for kind, num_bytes in once.items():
                if kind in self.spec.downloads:
                    self.meter.count_bytes(PREPARATION, device, "down", kind, num_bytes)
        if DownloadKind.ADAPTER in self.spec.downloads:
            self.meter.count_bytes(round_number, device, "down", DownloadKind.ADAPTER, published.num_bytes)

    def upload(self, device: str, round_number: int, result: DeviceResult) -> dict[PartKind, Part]:
        """What the server reads of a device's result."""
        files = update_files(
            result,
            self.spec.uploads,
            model_sha256=self._model_sha256,
            adapter_sha256=self._adapter_sha256,
            probe_set_sha256=self.prepared.probe_sha256,
        )
        for kind, content in files.items():
            self.meter.count_bytes(round_number, device, "up", kind, len(content))
        return {kind: self._through(kind, content) for kind, content in files.items()}

    @property
    def _model_sha256(self) -> str | None:
        small = self.prepared.small
        return None if small is None else small.manifest_sha256

    def _through(self, name: str, content: bytes) -> Part:
        path = self.folder / name
        path.write_bytes(content)
        return read_tensors(path)


@dataclass(frozen=True)
class Published:
    """theta of a round, None where the strategy shares none, and the bytes of its file."""

    adapter: dict[str, Tensor] | None
    num_bytes: int


@contextmanager
def wire(spec: StrategySpec, prepared: Prepared, meter: Meter) -> Iterator[Wire]:
    """A network for one run; its files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cotune-wire-") as name:
        yield Wire(Path(name), spec, prepared, meter)
