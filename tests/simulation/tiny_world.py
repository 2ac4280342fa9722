"""A data folder, base models of a few thousand parameters, and an experiment with them that takes seconds."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.data import examples_to_jsonl
from assets.models import save_language_model
from simulation.settings import SimulationSettings, settings_of
from tests.tiny_models import tiny_examples, tiny_language_model

LORA = {"rank": 2, "alpha": 4.0}
TRAINING = {"steps": 2, "batch_size": 4, "max_length": 64}
SERVER = {"steps": 2, "batch_size": 4, "max_length": 64}
CO_PLMS: dict[str, Any] = {
    "name": "co_plms",
    "proxy_lora": LORA,
    "llm_lora": LORA,
    "domain_steps": 1,
    "top_k": 8,
    "server": SERVER,
}


@dataclass(frozen=True)
class World:
    """Where the data and the models are."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def model(self, name: str) -> str:
        return str(self.folder / "models" / name)

    def table(self, *strategies: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        """An experiment as TOML gives it, with two devices: colours and sums."""
        table = {
            "name": "tiny",
            "rounds": 2,
            "llm": self.model("llama"),
            "slms": [self.model("gpt2"), self.model("qwen2")],
            "probe_rows": 6,
            "proxy": {"source": "prune", "layers": 1, "steps": 2, "batch_size": 4, "max_length": 64},
            "evaluation": {
                "validation_rows": 4,
                "test_rows": 3,
                "max_new_tokens": 4,
                "tolerance_bits_per_byte": 10.0,
            },
            "measured_length": 96,
            "transfer": False,
            "common": {"training": TRAINING, "slm_lora": LORA},
            "strategies": [*(strategies or (CO_PLMS, {"name": "standalone"}))],
        }
        return copy.deepcopy(table) | changes

    def settings(self, *strategies: Mapping[str, Any], **changes: Any) -> SimulationSettings:
        return settings_of(self.table(*strategies, **changes))


def build(folder: Path) -> World:
    world = World(folder)
    for kind in ("colour", "sum"):
        (world.data / kind).mkdir(parents=True)
        for place, (split, count) in enumerate({"train": 8, "validation": 5, "test": 6}.items()):
            rows = tiny_examples(count, start=100 * (place + 1), kind=kind)
            (world.data / kind / f"{split}.jsonl").write_bytes(examples_to_jsonl(rows))
    (world.data / "public.jsonl").write_bytes(examples_to_jsonl(tiny_examples(20, start=1000, kind="sum")))
    for name in ("llama", "gpt2", "qwen2"):
        save_language_model(tiny_language_model(name), Path(world.model(name)))
    return world
