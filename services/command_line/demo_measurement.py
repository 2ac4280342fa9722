"""Asks the API what both runs of a demo measured, and puts it together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from command_line.api_client import ApiClient
from command_line.demo_data import DemoData
from command_line.demo_devices import device_name
from command_line.demo_models import DemoModels
from command_line.embedded import Patience
from command_line.results import (
    CloudResult,
    DemoResults,
    SentInstead,
    bytes_by_kind,
    cloud_scores,
    counted_metrics,
    device_results,
    mean_alignment,
    mean_device_seconds,
    seconds_between,
    stage_seconds,
)
from command_line.supervisor import Supervisor, cpu_seconds, peak_memory_bytes
from protocol.devices import Device
from protocol.events import Event
from protocol.runs import ModelVersion, Round


@dataclass(frozen=True)
class Measurement:
    """Reads what was measured."""

    client: ApiClient
    patience: Patience
    data: DemoData
    models: DemoModels

    def results(
        self, standalone: str, co_tuning: str, seconds: dict[str, float], supervisor: Supervisor
    ) -> DemoResults:
        """Return the results of the two runs; `seconds` of the whole and `restarts` are for the caller to fill in."""
        client = self.client
        run = self.patience.ask(lambda: client.get_run(co_tuning))
        alone, together = self._rounds(standalone), self._rounds(co_tuning)
        versions = self.patience.ask(lambda: client.list_versions(co_tuning))
        devices = self._devices()
        return DemoResults(
            rounds=len(together),
            seconds=0.0,
            seconds_by_stage=seconds
            | {"standalone": seconds_between(self._events(standalone))}
            | stage_seconds(self._events(co_tuning)),
            devices=device_results(devices, alone, together),
            llm=self._cloud(versions, "llm"),
            proxy=self._cloud(versions, "proxy"),
            bytes=bytes_by_kind(self.patience.ask(lambda: client.traffic(co_tuning))),
            alignment=mean_alignment(together),
            instead=self._instead(len(together), len(devices)),
            device_seconds_by_stage=mean_device_seconds(together),
            peak_memory_bytes=supervisor.peak_memory() | {"demo": peak_memory_bytes(os.getpid())},
            cpu_seconds=supervisor.cpu_seconds() | {"demo": cpu_seconds(os.getpid())},
            promoted_version=run.latest_version or 0,
            updates_counted=sum(len(each) for each in counted_metrics(together).values()),
            restarts=0,
            seed=run.config.seed,
            data=str(self.data.folder) if self.data.given else "generated",
        )

    def _rounds(self, run_id: str) -> list[Round]:
        return self.patience.ask(lambda: self.client.list_rounds(run_id))

    def _devices(self) -> list[Device]:
        order = {device_name(index): index for index in range(len(self.data.domains))}
        return sorted(self.patience.ask(self.client.list_devices), key=lambda each: order[each.name])

    def _cloud(self, versions: Sequence[ModelVersion], name: str) -> CloudResult:
        """The LLM or the proxy; both have the LLM's tokenizer."""
        before, after, _ = cloud_scores(versions, name)
        facts = versions[0].metrics["models"][name]
        return CloudResult(
            before=before,
            co_tuned=after,
            architecture=facts["architecture"],
            parameters=facts["parameters"],
            tokenizer=self.models.llm.tokenizer,
        )

    def _instead(self, rounds: int, num_devices: int) -> SentInstead:
        slms = sum(self.models.slm(index).weight_bytes for index in range(num_devices))
        return SentInstead(
            slm_weights=2 * rounds * slms, llm_weights=2 * rounds * num_devices * self.models.llm.weight_bytes
        )

    def _events(self, run_id: str) -> list[Event]:
        events: list[Event] = []
        while more := self._events_after(run_id, events[-1].sequence if events else 0):
            events += more
        return events

    def _events_after(self, run_id: str, sequence: int) -> list[Event]:
        return self.patience.ask(lambda: self.client.events(run_id, after=sequence))
