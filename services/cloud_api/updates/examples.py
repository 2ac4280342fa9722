"""Updates as the documentation shows them."""

from cloud_api.devices.examples import TIME
from cloud_api.rounds.examples import ASSIGNMENT_ID, ROUND_ID
from protocol.assignments import Part, PartReceipt, PartUpload, Submission, SubmissionReceipt, UpdateOutcome
from protocol.runs import AlignmentMetrics, DeviceMetrics
from protocol.statuses import AssignmentStatus, PartKind

PART_RECEIPT = PartReceipt(
    assignment_id=ASSIGNMENT_ID,
    kind=PartKind.ADAPTER_DELTA,
    sha256="9d" * 32,
    size_bytes=1_048_576,
    received_at=TIME,
)
OUTCOME = UpdateOutcome(
    assignment_id=ASSIGNMENT_ID,
    status=AssignmentStatus.QUARANTINED,
    reason="norm_outlier: expected a norm within 0.9 of the median 1.5 of the round's 12 updates, got 40",
    receipt=SubmissionReceipt(
        assignment_id=ASSIGNMENT_ID, round_id=ROUND_ID, update_sha256="8f" * 32, received_at=TIME
    ),
)
PART_UPLOAD = PartUpload(
    assignment_id=ASSIGNMENT_ID,
    kind=PartKind.ADAPTER_DELTA,
    upload_id="upl_01k0c5r7xq9z3m8v2w4y6t1b5d",
    sha256="9d" * 32,
    size_bytes=10_485_760,
    chunk_bytes=4_194_304,
    received_bytes=4_194_304,
    expires_at=TIME,
)
SUBMISSION = Submission(
    base_sha256="3b" * 32,
    num_examples=1200,
    parts=[
        Part(kind=PartKind.ADAPTER_DELTA, sha256="9d" * 32, size_bytes=1_048_576),
        Part(kind=PartKind.LOGITS, sha256="4e" * 32, size_bytes=393_216),
    ],
    metrics=DeviceMetrics(
        losses={"slm_ce": 1.71, "proxy_ce": 2.2},
        alignment=AlignmentMetrics(coverage=0.998, class_agreement=0.91, num_spans=8123, skipped_rows=0),
        seconds_by_stage={"domain_tuning": 12.4, "mutual_learning": 60.2},
        peak_memory_bytes=1_610_612_736,
    ),
)
RECEIPT = SubmissionReceipt(assignment_id=ASSIGNMENT_ID, round_id=ROUND_ID, update_sha256="8f" * 32, received_at=TIME)
