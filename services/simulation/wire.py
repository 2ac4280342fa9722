"""What crosses the network, in the form in which it does: each file is written, counted, and read back."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from assets.tensors import read_tensors
from assets.vocabulary_files import read_vocabulary, vocabulary_file
from assets.wire_files import adapter_file, message_file, read_message, update_files
from cotuning.language_model import LanguageModel
from cotuning.strategies.results import DeviceResult, Message
from cotuning.vocabulary import Vocabulary
from protocol.statuses import PartKind
from protocol.strategies import DownloadKind, StrategySpec
from simulation.budget import PREPARATION, Crossing, Meter
from simulation.errors import UndeclaredTraffic
from simulation.prepared import Prepared

Part = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and their header."""

_UNDECLARED = "message"
"""What a message counts as where the strategy declares none: the meter refuses it."""


def crossing(spec: StrategySpec) -> Crossing:
    """What a strategy declares to cross the network."""
    return Crossing(up=spec.parts, down=spec.downloads | spec.messages_down)


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
    _vocabularies: dict[str, tuple[bytes, Vocabulary]] = field(default_factory=dict)
    _adapter_sha256: str | None = None

    def publish(self, shared_adapter: Mapping[str, Tensor] | None, message: Message | None) -> "Published":
        """theta and the server's message, as devices of this round will read them."""
        theta, num_bytes = None, 0
        self._adapter_sha256 = None
        if shared_adapter is not None:
            content = adapter_file(shared_adapter, model_sha256=self._model_sha256)
            self._adapter_sha256 = hashlib.sha256(content).hexdigest()
            theta, num_bytes = self._through("adapter", content)[0], len(content)
        received, message_bytes = self._message(message, self.spec.received_message or _UNDECLARED)
        return Published(theta, num_bytes, received, message_bytes, self.llm_vocabulary)

    def download(self, device: str, round_number: int, published: "Published") -> None:
        """Count what a device fetches: once what does not change, theta, and the server's message."""
        small = self.prepared.small
        once = {
            DownloadKind.PROXY_BASE: small.num_bytes if small is not None else 0,
            DownloadKind.MODEL_MANIFEST: small.manifest_bytes if small is not None else 0,
            DownloadKind.PROBE_SET: self.prepared.probe_bytes,
            DownloadKind.LLM_VOCABULARY: self._llm_vocabulary_bytes,
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
            kind = self.spec.received_message or _UNDECLARED
            self.meter.count_bytes(round_number, device, "down", kind, published.message_bytes)

    @property
    def llm_vocabulary(self) -> Vocabulary | None:
        """The LLM's tokenizer, as devices receive it; None where they do not."""
        llm = self.prepared.llm
        if llm is None or DownloadKind.LLM_VOCABULARY not in self.spec.downloads:
            return None
        return self._travelled("", llm)[1]

    def upload_vocabulary(self, device: str, round_number: int, slm: LanguageModel) -> Vocabulary | None:
        """A device's tokenizer, as the server receives it, which it does once; None where it does not."""
        if PartKind.SLM_VOCABULARY not in self.spec.uploads:
            return None
        known = device in self._vocabularies
        content, vocabulary = self._travelled(device, slm)
        if not known:
            self.meter.count_bytes(round_number, device, "up", PartKind.SLM_VOCABULARY, len(content))
        return vocabulary

    def upload(self, device: str, round_number: int, result: DeviceResult) -> dict[PartKind, Part]:
        """What the server reads of a device's result, beside its message and its tokenizer."""
        parts = self.spec.uploads - {PartKind.SLM_VOCABULARY}
        files = update_files(
            replace(result, message=None),
            replace(self.spec, uploads=parts),
            vocabulary=bytes,
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
        kind = self.spec.sent_message or _UNDECLARED
        received, num_bytes = self._message(result.message, kind)
        if received is not None:
            if received.rows:
                raise UndeclaredTraffic(f"expected a message without rows from {device}, got {len(received.rows)}")
            self.meter.count_bytes(round_number, device, "up", kind, num_bytes)
        return received

    def _message(self, message: Message | None, kind: str) -> tuple[Message | None, int]:
        if message is None:
            return None, 0
        content = message_file(message, kind)
        path = self.folder / "message"
        path.write_bytes(content)
        return read_message(path, kind), len(content)

    def _travelled(self, whose: str, lm: LanguageModel) -> tuple[bytes, Vocabulary]:
        """A tokenizer's file, and what is read of it; the LLM's is nobody's."""
        if whose not in self._vocabularies:
            path = self.folder / "vocabulary"
            content = vocabulary_file(lm)
            path.write_bytes(content)
            self._vocabularies[whose] = content, read_vocabulary(path, lm.device)
        return self._vocabularies[whose]

    @property
    def _llm_vocabulary_bytes(self) -> int:
        if self.llm_vocabulary is None or self.prepared.llm is None:
            return 0
        return len(self._travelled("", self.prepared.llm)[0])

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
    """What all devices are sent for a round: theta, the server's message and the LLM's tokenizer, None where there is
    none, and the bytes of the first two."""

    adapter: dict[str, Tensor] | None
    num_bytes: int
    message: Message | None
    message_bytes: int
    llm_vocabulary: Vocabulary | None = None


@contextmanager
def wire(spec: StrategySpec, prepared: Prepared, meter: Meter) -> Iterator[Wire]:
    """A network for one run; its files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cotune-wire-") as name:
        yield Wire(Path(name), spec, prepared, meter)
