"""Assignments as the documentation shows them."""

from cloud_api.devices.examples import TIME
from cloud_api.rounds.examples import ASSIGNMENT_ID, ROUND_ID
from cloud_api.runs.examples import RUN_ID
from protocol.assignments import (
    ArtifactRef,
    Assignment,
    AssignmentProgress,
    AssignmentRefusal,
    AssignmentState,
)
from protocol.runs import EvaluationSettings
from protocol.statuses import AssignmentStatus, PartKind
from protocol.strategies import CoPlmsSettings, FedMktSettings

ASSIGNMENT = Assignment(
    assignment_id=ASSIGNMENT_ID,
    run_id=RUN_ID,
    run_name="assistants",
    round_id=ROUND_ID,
    round_number=1,
    rounds=5,
    status=AssignmentStatus.OFFERED,
    strategy=CoPlmsSettings(),
    seed=0,
    base_version=0,
    proxy_manifest=ArtifactRef(sha256="1a" * 32, size_bytes=512),
    adapter=ArtifactRef(sha256="3b" * 32, size_bytes=1_048_576),
    probe_set=ArtifactRef(sha256="5c" * 32, size_bytes=16_384),
    uploads=[PartKind.ADAPTER_DELTA, PartKind.LOGITS],
    upload_limits={PartKind.ADAPTER_DELTA: 536_870_912, PartKind.LOGITS: 536_870_912},
    evaluation=EvaluationSettings(),
    evaluate_before=True,
    evaluate_after=False,
    deadline_at=TIME,
)
LAST_STEP = ASSIGNMENT.model_copy(
    update={
        "round_number": 6,
        "base_version": 5,
        "strategy": FedMktSettings(),
        "proxy_manifest": None,
        "adapter": None,
        "llm_vocabulary": ArtifactRef(sha256="7e" * 32, size_bytes=20_480),
        "message": ArtifactRef(sha256="6d" * 32, size_bytes=65_536),
        "uploads": [],
        "upload_limits": {},
        "evaluate_before": False,
    }
)
PROGRESS = AssignmentProgress(
    status=AssignmentStatus.TRAINING,
    stage="mutual_learning",
    step=12,
    steps=60,
    losses={"slm_ce": 1.93, "proxy_ce": 2.41},
)
STATE = AssignmentState(status=AssignmentStatus.TRAINING)
REFUSAL = AssignmentRefusal(reason="the proxy does not fit: expected 2.1 GiB free, got 1.4 GiB", code="out_of_memory")
REFUSED = AssignmentState(status=AssignmentStatus.REJECTED)
