"""A round that can really be trained: tiny models, private rows, and a co_plms assignment in the faulty cloud."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.data import examples_to_jsonl
from assets.models import list_model_files, save_language_model
from assets.tensors import tensors_to_bytes
from cotuning.adapters import fresh_adapter, lora_config
from edge_agent import settings
from edge_agent.cycle import RoundFiles
from edge_agent.settings import Config
from protocol.assignments import ArtifactRef, Assignment, ModelFile, ModelManifest
from protocol.runs import EvaluationSettings
from protocol.strategies import CoPlmsSettings, LocalTraining, LoraSettings, StandaloneSettings
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud
from tests.tiny_models import tiny_examples, tiny_language_model

LORA = LoraSettings(rank=2, alpha=4)
CO_PLMS = CoPlmsSettings(
    slm_lora=LORA,
    proxy_lora=LORA,
    llm_lora=LORA,
    training=LocalTraining(steps=4, batch_size=4, max_length=96),
    domain_steps=3,
    top_k=8,
)
STANDALONE = StandaloneSettings(slm_lora=LORA, training=LocalTraining(steps=3, batch_size=4, max_length=96))
SECRETS = [f"diary entry {number}: the safe code is {number * 7919 + 104729}" for number in range(1, 13)]
"""Private answers; no public row holds anything like them."""


@dataclass(frozen=True)
class TinyWorld:
    """Files of one device and one round."""

    folder: Path
    config: Config
    proxy_folder: Path
    adapter: Path
    probe_set: Path

    @property
    def files(self) -> RoundFiles:
        return RoundFiles(self.proxy_folder, self.adapter, self.probe_set)

    def assignment(self, cloud: FakeCloud, number: int = 1, **changes: Any) -> Assignment:
        """Put everything into the cloud, and an assignment that names it."""
        files = []
        for path in list_model_files(self.proxy_folder):
            ref = cloud.add_artifact(path.read_bytes())
            files.append(ModelFile(path=path.name, sha256=ref.sha256, size_bytes=ref.size_bytes))
        manifest = ModelManifest(files=files).model_dump_json().encode()
        values = {
            "strategy": CO_PLMS,
            "proxy_manifest": cloud.add_artifact(manifest),
            "adapter": cloud.add_artifact(self.adapter.read_bytes()),
            "probe_set": cloud.add_artifact(self.probe_set.read_bytes()),
            "evaluation": EvaluationSettings(test_rows=3, max_new_tokens=4),
        }
        return make_assignment(cloud, number, **(values | changes))

    def standalone_assignment(self, cloud: FakeCloud, number: int = 1) -> Assignment:
        nothing = {"proxy_manifest": None, "adapter": None, "probe_set": None, "uploads": [], "upload_limits": {}}
        return self.assignment(cloud, number, strategy=STANDALONE, **nothing)

    def home(self, server_url: str) -> Path:
        """An enrolled home folder for the `cotune-agent` process."""
        home = self.folder / f"home-{hashlib.sha256(server_url.encode()).hexdigest()[:8]}"
        home.mkdir()
        server = self.config.server.model_copy(update={"url": server_url})
        settings.write_config(home, self.config.model_copy(update={"server": server}))
        settings.write_credential(home, "dev_1.secret")
        return home


def build_world(folder: Path, slm: str = "gpt2") -> TinyWorld:
    save_language_model(tiny_language_model(slm), folder / "slm")
    proxy = tiny_language_model("llama_proxy")
    save_language_model(proxy, folder / "proxy")
    theta = fresh_adapter(proxy, lora_config(proxy, **LORA.model_dump()), seed=1)
    (folder / "adapter").write_bytes(tensors_to_bytes(theta, {"format": "cotune-adapter/1"}))
    (folder / "probe.jsonl").write_bytes(examples_to_jsonl(tiny_examples(4, start=100)))
    rows = [{"instruction": "Recall.", "input": f"Day {i}", "output": text} for i, text in enumerate(SECRETS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "test.jsonl").write_bytes(examples_to_jsonl(tiny_examples(6)))
    config = Config.model_validate(
        {
            "server": {"url": "http://127.0.0.1:1"},
            "device": {"id": "dev_1", "name": "tiny"},
            "model": {"path": str(folder / "slm")},
            "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        }
    )
    return TinyWorld(folder, config, folder / "proxy", folder / "adapter", folder / "probe.jsonl")


def artifact_of(path: Path) -> ArtifactRef:
    content = path.read_bytes()
    return ArtifactRef(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
