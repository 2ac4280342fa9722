"""What a device is asked to do, and what it answers."""

from typing import Literal

from pydantic import Field

from protocol.base import MAX_COUNT, RequestModel, ResponseModel, Sha256, Timestamp
from protocol.runs import DeviceMetrics, EvaluationSettings
from protocol.statuses import AssignmentStatus, PartKind
from protocol.strategies import Strategy

CountsIn = Literal["this_round", "later_round", "no_round"]
"""What becomes of a submitted update."""


class ArtifactRef(ResponseModel):
    """A file to fetch from `/v1/artifacts/{sha256}`."""

    sha256: Sha256
    size_bytes: int


class ModelFile(ResponseModel):
    """One file of a model folder."""

    path: str = Field(
        max_length=255, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="File name; folders are flat."
    )
    sha256: Sha256
    size_bytes: int


class ModelFingerprint(ResponseModel):
    """What a model is, whatever its files look like: equal fingerprints, equal weights and token ids."""

    weights: Sha256
    tokenizer: Sha256


class ModelManifest(ResponseModel):
    """A Hugging Face model folder as a list of files. Its own SHA-256 identifies the model."""

    files: list[ModelFile]
    fingerprint: ModelFingerprint | None = Field(
        default=None, description="Where devices must have this model already: what theirs is compared with."
    )


class AssignmentName(ResponseModel):
    """Which assignment it is: all that a device needs to refuse one that it cannot read."""

    assignment_id: str
    run_id: str
    round_number: int


class Assignment(AssignmentName):
    """One device's share of one round: everything it needs, by hash."""

    run_name: str
    round_id: str
    rounds: int
    status: AssignmentStatus
    strategy: Strategy
    seed: int
    base_version: int
    proxy_manifest: ArtifactRef | None = Field(
        default=None, description="JSON of a `ModelManifest`: the small model whose adapter is shared."
    )
    adapter: ArtifactRef | None = Field(default=None, description="theta_t, the shared adapter to start from.")
    adapter_rank: int | None = Field(
        default=None, description="Rank to which theta_t is cut, and that the delta has; null: the run's, uncut."
    )
    probe_set: ArtifactRef | None = Field(default=None, description="Public rows Q, JSONL.")
    llm_vocabulary: ArtifactRef | None = Field(default=None, description="The LLM's tokenizer, as a file of tensors.")
    message: ArtifactRef | None = Field(
        default=None, description="What the server sends all devices with the version that the round starts from."
    )
    uploads: list[PartKind] = Field(description="The parts that the update has, and no others.")
    optional_uploads: list[PartKind] = Field(
        default_factory=list, description="Those of `uploads` that may be missing: a message that is not always sent."
    )
    upload_limits: dict[PartKind, int] = Field(description="Largest size of each part, bytes.")
    evaluation: EvaluationSettings
    evaluate_before: bool
    evaluate_after: bool
    deadline_at: Timestamp


class AssignmentProgress(RequestModel):
    """Where a device is. `status` may only move forward."""

    status: Literal[AssignmentStatus.ACCEPTED, AssignmentStatus.TRAINING, AssignmentStatus.UPLOADING]
    stage: str | None = Field(default=None, max_length=64)
    step: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    steps: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    losses: dict[str, float] = Field(default_factory=dict, max_length=16)


class AssignmentState(ResponseModel):
    """Where the assignment is now, which may be ahead of what was reported."""

    status: AssignmentStatus


class AssignmentRefusal(RequestModel):
    """A device cannot do it."""

    reason: str = Field(min_length=1, max_length=400)
    code: str = Field(max_length=64, description="An `ErrorCode` or a device's own word, e.g. `out_of_memory`.")


class Part(RequestModel):
    """One uploaded file of an update."""

    kind: PartKind
    sha256: Sha256
    size_bytes: int = Field(ge=1, le=MAX_COUNT)


class Submission(RequestModel):
    """An update, once its parts are uploaded."""

    base_sha256: Sha256 | None = Field(description="SHA-256 of the shared adapter that the device started from.")
    num_examples: int = Field(ge=1, le=MAX_COUNT, description="Weight of the update: private rows trained on.")
    parts: list[Part] = Field(max_length=8)
    metrics: DeviceMetrics


class PartReceipt(ResponseModel):
    """The server has the file, durably."""

    assignment_id: str
    kind: PartKind
    sha256: Sha256
    size_bytes: int
    received_at: Timestamp


class UpdateOutcome(ResponseModel):
    """What became of a device's update."""

    assignment_id: str
    status: AssignmentStatus
    reason: str | None = Field(default=None, description="Why it is rejected, quarantined, late or lost.")
    receipt: "SubmissionReceipt | None" = Field(default=None, description="Once it was submitted.")


class PartUpload(ResponseModel):
    """A file that comes in chunks, and how far it has come."""

    assignment_id: str
    kind: PartKind
    upload_id: str | None = Field(description="Null once the file is complete.")
    sha256: Sha256 = Field(description="Of the whole file.")
    size_bytes: int = Field(description="Of the whole file.")
    chunk_bytes: int = Field(description="Each chunk has exactly so many bytes, the last one what is left.")
    received_bytes: int = Field(description="So many are there, durably; the next chunk starts here.")
    expires_at: Timestamp | None = Field(description="When it is forgotten if nothing more comes; each chunk moves it.")
    receipt: PartReceipt | None = Field(default=None, description="Once the file is complete.")


class SubmissionReceipt(ResponseModel):
    """The server has the update, durably; the device may delete its copy. The same for the same content."""

    assignment_id: str
    round_id: str
    update_sha256: Sha256 = Field(description="Hash of the submission's canonical JSON: the update's identity.")
    received_at: Timestamp
    counts_in: CountsIn = Field(
        default="this_round",
        description="`later_round`: it came late, and the next round that closes uses it if it is not too old by then; "
        "`no_round`: it came late and is only kept.",
    )
