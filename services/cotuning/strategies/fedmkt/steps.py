"""FedMKT as a strategy: what of a round's inputs its two steps take, and its logits as messages."""

from dataclasses import replace

from cotuning.received_logits import Received
from cotuning.strategies.fedmkt.device import device_step, last_transfer
from cotuning.strategies.fedmkt.server import server_step
from cotuning.strategies.fedmkt.student import parse_logits
from cotuning.strategies.interface import DeviceInputs, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, Message, ServerResult, TeacherRows
from protocol.strategies import FedMktSettings


class FedMkt(StrategySteps[FedMktSettings]):
    """Logits on the probe set, both ways."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """As `device.device_step`; the logits leave as a message."""
        result = device_step(
            slm=given.slm,
            private=given.private,
            probe=given.probe,
            llm_logits=self._of_llm(given),
            slm_adapter=given.slm_adapter,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
        message = Message(result.logits, result.logits_metadata)
        return replace(result, logits={}, logits_metadata={}, message=message)

    def last_step(self, given: DeviceInputs) -> DeviceResult | None:
        """As `device.last_transfer`."""
        llm_logits = self._of_llm(given)
        if llm_logits is None:
            return None
        return last_transfer(
            slm=given.slm,
            probe=given.probe,
            llm_logits=llm_logits,
            slm_adapter=given.slm_adapter,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )

    def server_step(self, given: ServerInputs) -> ServerResult:
        """As `server.server_step`; the LLM's logits leave as a message. The alignment is that of the least coverage."""
        assert given.llm is not None
        received = [
            parse_logits(
                each.tensors, each.metadata, vocabulary=each.vocabulary, probe=given.probe, settings=self.settings
            )
            for each in given.device_messages
        ]
        served = server_step(
            llm=given.llm,
            probe=given.probe,
            llm_adapter=given.llm_adapter,
            device_logits=received,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
        return ServerResult(
            shared_adapter=None,
            llm_adapter=served.llm_adapter,
            losses=served.losses,
            alignment=min(served.alignments, key=lambda each: each.coverage, default=None),
            teacher=TeacherRows(len(given.probe), [0] * len(received), served.rows_taught),
            message=Message(served.logits, served.logits_metadata),
        )

    def _of_llm(self, given: DeviceInputs) -> Received | None:
        if given.message is None:
            return None
        assert given.llm_vocabulary is not None
        return parse_logits(
            given.message.tensors,
            given.message.metadata,
            vocabulary=given.llm_vocabulary,
            probe=given.probe,
            settings=self.settings,
        )
