"""What crosses the network, in the form in which it does: each file is written, counted, and read back."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from assets.data import examples_to_jsonl
from assets.tensors import read_tensors, tensors_to_bytes
from assets.wire_files import adapter_file, update_files
from cotuning.strategies.results import DeviceResult, Message
from protocol.statuses import PartKind
from protocol.strategies import DownloadKind, StrategySpec
from simulation.budget import PREPARATION, Crossing, Meter
from simulation.errors import UndeclaredTraffic
from simulation.prepared import Prepared

Part = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and their header."""

_UNDECLARED = frozenset({"message"})
"""What a message counts as where the strategy declares none: the meter refuses it."""


def crossing(spec: StrategySpec) -> Crossing:
    """What a strategy declares to cross the network."""
    return Crossing(up=spec.uploads | spec.messages_up, down=spec.downloads | spec.messages_down)


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

    def publish(self, shared_adapter: Mapping[str, Tensor] | None, message: Message | None) -> "Published":
        """theta and the server's message, as devices of this round will read them."""
        theta, num_bytes = None, 0
        self._adapter_sha256 = None
        if shared_adapter is not None:
            content = adapter_file(shared_adapter, model_sha256=self._model_sha256)
            self._adapter_sha256 = hashlib.sha256(content).hexdigest()
            theta, num_bytes = self._through("adapter", content)[0], len(content)
        received, message_bytes = self._message(message)
        return Published(theta, num_bytes, received, message_bytes)

    def download(self, device: str, round_number: int, published: "Published") -> None:
        """Count what a device fetches: once what does not change, theta, and the server's message."""
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
        self.download_message(device, round_number, published)

    def download_message(self, device: str, round_number: int, published: "Published") -> None:
        """Count the server's message, where there is one.

        Raises:
            UndeclaredTraffic: the strategy declares none.
        """
        if published.message is not None:
            for kind in self.spec.messages_down or _UNDECLARED:
                self.meter.count_bytes(round_number, device, "down", kind, published.message_bytes)

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

    def upload_message(self, device: str, round_number: int, result: DeviceResult) -> Message | None:
        """What the server reads of a device's message.

        Raises:
            UndeclaredTraffic: the strategy declares none; or there are rows in it: no text leaves a device.
        """
        received, num_bytes = self._message(result.message)
        if received is not None:
            if received.rows:
                raise UndeclaredTraffic(f"expected a message without rows from {device}, got {len(received.rows)}")
            for kind in self.spec.messages_up or _UNDECLARED:
                self.meter.count_bytes(round_number, device, "up", kind, num_bytes)
        return received

    def _message(self, message: Message | None) -> tuple[Message | None, int]:
        if message is None:
            return None, 0
        content = tensors_to_bytes(message.tensors, message.metadata)
        rows = examples_to_jsonl(message.rows)
        return Message(*self._through("message", content), message.rows), len(content) + len(rows)

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
    """What all devices are sent for a round: theta and the server's message, None where there is none, and the bytes
    of each."""

    adapter: dict[str, Tensor] | None
    num_bytes: int
    message: Message | None
    message_bytes: int


@contextmanager
def wire(spec: StrategySpec, prepared: Prepared, meter: Meter) -> Iterator[Wire]:
    """A network for one run; its files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cotune-wire-") as name:
        yield Wire(Path(name), spec, prepared, meter)
