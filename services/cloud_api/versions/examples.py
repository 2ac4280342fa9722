"""Versions as the documentation shows them."""

from cloud_api.devices.examples import TIME
from cloud_api.rounds.examples import ROUND_ID
from cloud_api.runs.examples import RUN_ID
from protocol.pages import Page
from protocol.runs import ModelVersion, Scores, VersionStep

VERSION = ModelVersion(
    run_id=RUN_ID,
    number=1,
    round_id=ROUND_ID,
    promoted=True,
    proxy_adapter_sha256="3b" * 32,
    llm_adapter_sha256="7c" * 32,
    num_updates=3,
    parent=0,
    lineage=[
        VersionStep(number=1, parent=0, round_id=ROUND_ID, round_number=1, attempt=1, num_updates=3),
        VersionStep(number=0, parent=None, round_id=None, round_number=None, attempt=None, num_updates=0),
    ],
    metrics={
        "validation": {
            "llm": Scores(rouge_l=41.2, exact_match=23.4, bits_per_byte=1.31, num_rows=64).model_dump(mode="json")
        }
    },
    created_at=TIME,
)
VERSIONS = Page[ModelVersion](items=[VERSION], next_cursor=None)
MODEL_CARD = """\
---
base_model: "Qwen/Qwen2.5-7B-Instruct"
library_name: peft
license: "apache-2.0"
---

# assistants, version 1
"""
