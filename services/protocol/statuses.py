"""Every status that a run, a round, an assignment, a device, a job and a part can have, one sentence each.

Which move is allowed is not said here: the transition tables live in `persistence`, beside the code that applies them.
"""

from enum import StrEnum


class RunStatus(StrEnum):
    """The life of a run."""

    PENDING = "pending"  # Created; the preparation job waits for a worker.
    PREPARING = "preparing"  # A worker builds and distils the proxy and evaluates the models before tuning.
    RUNNING = "running"  # Rounds are being played.
    PAUSED = "paused"  # An operator holds it: no new round opens, no assignment is offered.
    COMPLETED = "completed"  # The last round was published.
    FAILED = "failed"  # It cannot go on by itself; `error_code` and `status_reason` say why. An operator may retry it.
    STOPPED = "stopped"  # An operator ended it.


class RoundStatus(StrEnum):
    """The life of a round."""

    OPEN = "open"  # Assignments may be offered; nobody has accepted yet.
    COLLECTING = "collecting"  # At least one device works on it.
    AGGREGATING = "aggregating"  # Closed for updates; a worker averages the counted deltas.
    CO_TUNING = "co_tuning"  # The LLM and the shared small model teach each other on the public set.
    EVALUATING = "evaluating"  # The candidate version is measured against the last published one.
    PUBLISHED = "published"  # The round is over and its model version is decided.
    FAILED = "failed"  # The server side could not finish it.
    ABANDONED = "abandoned"  # Too few updates came before its deadline, or the run ended.


class AssignmentStatus(StrEnum):
    """The life of one device's share of one round."""

    OFFERED = "offered"  # Answered to the device's poll.
    ACCEPTED = "accepted"  # The device has said that it will do it.
    TRAINING = "training"  # The device trains.
    UPLOADING = "uploading"  # The update is durable on the device and travels.
    SUBMITTED = "submitted"  # Received whole and admitted by its headers; its values are checked at aggregation.
    COUNTED = "counted"  # Part of a round's aggregate; of one round only.
    QUARANTINED = "quarantined"  # Received, kept and not counted: it is unlike the others; `reason` says how.
    REJECTED = "rejected"  # Refused; `reason` says why.
    LATE = "late"  # It came after the round had closed, or its round failed; a later round may count it.
    LOST = "lost"  # Its deadline passed and the device did not deliver.


class DeviceStatus(StrEnum):
    """The life of a device."""

    PENDING = "pending"  # Enrolled, waiting for an operator's approval.
    REGISTERED = "registered"  # Enrolled and heard from lately.
    OFFLINE = "offline"  # Not heard from for longer than the offline time-out.
    REVOKED = "revoked"  # Its credential is void for ever.


class JobStatus(StrEnum):
    """The life of a job in the transactional outbox."""

    QUEUED = "queued"  # To be sent, or sent and not yet claimed.
    CLAIMED = "claimed"  # A worker holds its lease.
    DONE = "done"  # Its result is committed.
    FAILED = "failed"  # It failed for good; the reason is kept.


class JobKind(StrEnum):
    """What a worker can be asked to do. The value is also the Celery task's name behind `cotune.`."""

    PREPARE_RUN = "prepare_run"
    AGGREGATE_ROUND = "aggregate_round"
    CO_TUNE_ROUND = "co_tune_round"
    EVALUATE_ROUND = "evaluate_round"

    @property
    def task_name(self) -> str:
        """The name under which the Celery task is registered, for example `cotune.prepare_run`."""
        return f"cotune.{self.value}"


class WaitingFor(StrEnum):
    """What a run waits for."""

    WORKER = "worker"  # A job is queued and no worker has taken it.
    QUEUE = "queue"  # A job is queued behind other jobs that workers do.
    LOST_WORKER = "lost_worker"  # The worker's lease ran out; the sweep gives the job to another one.
    PREPARATION = "preparation"  # A worker prepares the run.
    AGGREGATION = "aggregation"  # A worker averages the round's updates.
    CO_TUNING = "co_tuning"  # A worker lets the LLM and the shared small model teach each other.
    EVALUATION = "evaluation"  # A worker measures the round's candidate.
    DEVICES = "devices"  # Fewer devices than `min_updates` have taken the round.
    UPDATES = "updates"  # Enough devices have taken it; they train.
    STRAGGLERS = "stragglers"  # `min_updates` came; the rest may still come in their grace.
    OPERATOR = "operator"  # It is paused.


TRAINING_QUEUE = "cotune-training"
"""The queue of the jobs that need torch: one solo worker a GPU."""


class PartKind(StrEnum):
    """The files that one update can consist of. Nothing else is accepted from a device."""

    ADAPTER_DELTA = "adapter_delta"  # Trained minus received values of the shared LoRA adapter, safetensors.
    LOGITS = "logits"  # Top-K folded probe-set distributions of the proxy, safetensors.
    SLM_LOGITS = "slm_logits"  # A message: top-K probe-set distributions of the device's SLM, over its own token ids.
    SLM_FEATURES = "slm_features"  # A message: pooled hidden states of the device's SLM on the probe set.
    COUNTS = "counts"  # A message: how many of the candidates of each seed, or task, the device kept.
    SLM_VOCABULARY = "slm_vocabulary"  # The tokenizer of the device's SLM, for who reads its logits.
