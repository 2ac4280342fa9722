"""Error codes: stable strings that clients may switch on, with the HTTP status each one travels under.

The body of every error is `application/problem+json` (RFC 9457): `type`, `title`, `status`, `detail`, `code`, and
`expected` / `received` where the two can be said apart.
"""

from enum import StrEnum
from typing import Any

from pydantic import Field

from protocol.base import ResponseModel

PROBLEM_MEDIA_TYPE = "application/problem+json"


class ErrorCode(StrEnum):
    """Every error that the API can answer with."""

    MALFORMED_REQUEST = "malformed_request"
    INVALID_FIELD = "invalid_field"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    DEVICE_REVOKED = "device_revoked"
    DEVICE_NOT_APPROVED = "device_not_approved"
    ENROLMENT_TOKEN_UNKNOWN = "enrolment_token_unknown"
    ENROLMENT_TOKEN_USED = "enrolment_token_used"
    ENROLMENT_TOKEN_EXPIRED = "enrolment_token_expired"
    ENROLMENT_TOKEN_REVOKED = "enrolment_token_revoked"
    SIGNATURE_REQUIRED = "signature_required"
    SIGNATURE_INVALID = "signature_invalid"
    SIGNATURE_EXPIRED = "signature_expired"
    REQUEST_REPLAYED = "request_replayed"
    RATE_LIMITED = "rate_limited"
    NOT_FOUND = "not_found"
    RUN_NOT_FOUND = "run_not_found"
    ROUND_NOT_FOUND = "round_not_found"
    ASSIGNMENT_NOT_FOUND = "assignment_not_found"
    ARTIFACT_NOT_FOUND = "artifact_not_found"
    VERSION_NOT_FOUND = "version_not_found"
    DEVICE_NOT_FOUND = "device_not_found"
    WEBHOOK_NOT_FOUND = "webhook_not_found"
    ENROLMENT_TOKEN_NOT_FOUND = "enrolment_token_not_found"
    OPERATOR_KEY_NOT_FOUND = "operator_key_not_found"
    FEDERATION_NOT_FOUND = "federation_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    NAME_TAKEN = "name_taken"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    ILLEGAL_TRANSITION = "illegal_transition"
    ROUND_CLOSED = "round_closed"
    UPDATE_CONFLICT = "update_conflict"
    UPDATE_INCOMPLETE = "update_incomplete"
    WRONG_BASE_VERSION = "wrong_base_version"
    WRONG_TENSOR_NAMES = "wrong_tensor_names"
    WRONG_TENSOR_SHAPE = "wrong_tensor_shape"
    WRONG_TENSOR_DTYPE = "wrong_tensor_dtype"
    NON_FINITE_VALUES = "non_finite_values"
    NORM_OUT_OF_RANGE = "norm_out_of_range"
    NORM_OUTLIER = "norm_outlier"
    LOGITS_MISMATCH = "logits_mismatch"
    MESSAGE_MISMATCH = "message_mismatch"
    NOT_SAFETENSORS = "not_safetensors"
    DIGEST_MISMATCH = "digest_mismatch"
    LENGTH_REQUIRED = "length_required"
    TRUNCATED_BODY = "truncated_body"
    BODY_TOO_LARGE = "body_too_large"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
    UPLOAD_NOT_FOUND = "upload_not_found"
    UPLOAD_OFFSET_MISMATCH = "upload_offset_mismatch"
    UNKNOWN_STRATEGY = "unknown_strategy"
    MODEL_FOLDER_MISSING = "model_folder_missing"
    DATA_FILE_INVALID = "data_file_invalid"
    COVERAGE_TOO_LOW = "coverage_too_low"
    NOT_ENOUGH_MEMORY = "not_enough_memory"
    TOO_FEW_UPDATES = "too_few_updates"
    TOO_FEW_DEVICES = "too_few_devices"
    VERSION_NOT_PROMOTED = "version_not_promoted"
    JOB_FAILED = "job_failed"
    UNSUPPORTED_PROTOCOL = "unsupported_protocol"
    INTERNAL_ERROR = "internal_error"
    UNAVAILABLE = "unavailable"


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.MALFORMED_REQUEST: 400,
    ErrorCode.INVALID_FIELD: 422,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.DEVICE_REVOKED: 403,
    ErrorCode.DEVICE_NOT_APPROVED: 403,
    ErrorCode.ENROLMENT_TOKEN_UNKNOWN: 401,
    ErrorCode.ENROLMENT_TOKEN_USED: 409,
    ErrorCode.ENROLMENT_TOKEN_EXPIRED: 410,
    ErrorCode.ENROLMENT_TOKEN_REVOKED: 410,
    ErrorCode.SIGNATURE_REQUIRED: 401,
    ErrorCode.SIGNATURE_INVALID: 401,
    ErrorCode.SIGNATURE_EXPIRED: 401,
    ErrorCode.REQUEST_REPLAYED: 401,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.RUN_NOT_FOUND: 404,
    ErrorCode.ROUND_NOT_FOUND: 404,
    ErrorCode.ASSIGNMENT_NOT_FOUND: 404,
    ErrorCode.ARTIFACT_NOT_FOUND: 404,
    ErrorCode.VERSION_NOT_FOUND: 404,
    ErrorCode.DEVICE_NOT_FOUND: 404,
    ErrorCode.WEBHOOK_NOT_FOUND: 404,
    ErrorCode.ENROLMENT_TOKEN_NOT_FOUND: 404,
    ErrorCode.OPERATOR_KEY_NOT_FOUND: 404,
    ErrorCode.FEDERATION_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.CONFLICT: 409,
    ErrorCode.NAME_TAKEN: 409,
    ErrorCode.IDEMPOTENCY_KEY_REUSED: 409,
    ErrorCode.ILLEGAL_TRANSITION: 409,
    ErrorCode.ROUND_CLOSED: 409,
    ErrorCode.UPDATE_CONFLICT: 409,
    ErrorCode.UPDATE_INCOMPLETE: 409,
    ErrorCode.WRONG_BASE_VERSION: 409,
    ErrorCode.WRONG_TENSOR_NAMES: 422,
    ErrorCode.WRONG_TENSOR_SHAPE: 422,
    ErrorCode.WRONG_TENSOR_DTYPE: 422,
    ErrorCode.NON_FINITE_VALUES: 422,
    ErrorCode.NORM_OUT_OF_RANGE: 422,
    ErrorCode.NORM_OUTLIER: 422,
    ErrorCode.LOGITS_MISMATCH: 422,
    ErrorCode.MESSAGE_MISMATCH: 422,
    ErrorCode.NOT_SAFETENSORS: 422,
    ErrorCode.DIGEST_MISMATCH: 422,
    ErrorCode.LENGTH_REQUIRED: 411,
    ErrorCode.TRUNCATED_BODY: 400,
    ErrorCode.BODY_TOO_LARGE: 413,
    ErrorCode.RANGE_NOT_SATISFIABLE: 416,
    ErrorCode.UPLOAD_NOT_FOUND: 404,
    ErrorCode.UPLOAD_OFFSET_MISMATCH: 409,
    ErrorCode.UNKNOWN_STRATEGY: 422,
    ErrorCode.MODEL_FOLDER_MISSING: 422,
    ErrorCode.DATA_FILE_INVALID: 422,
    ErrorCode.COVERAGE_TOO_LOW: 422,
    ErrorCode.NOT_ENOUGH_MEMORY: 422,
    ErrorCode.TOO_FEW_UPDATES: 409,
    ErrorCode.TOO_FEW_DEVICES: 409,
    ErrorCode.VERSION_NOT_PROMOTED: 409,
    ErrorCode.JOB_FAILED: 500,
    ErrorCode.UNSUPPORTED_PROTOCOL: 400,
    ErrorCode.INTERNAL_ERROR: 500,
    ErrorCode.UNAVAILABLE: 503,
}


class FieldProblem(ResponseModel):
    """One field of a request that is wrong."""

    field: str = Field(description="Where it is, dotted: `rounds`, `co_plms.alpha`.")
    message: str = Field(description="What was expected.")
    received: Any = Field(default=None, description="What came, shortened.")


class Problem(ResponseModel):
    """The body of every error answer (RFC 9457)."""

    type: str = Field(description="URI of the kind of problem, which explains it: `/problems/<code>` on the server.")
    title: str = Field(description="The code in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened, with what was expected and what came.")
    code: ErrorCode = Field(description="Stable; switch on this.")
    expected: Any = Field(default=None, description="What was expected, where that can be said by itself.")
    received: Any = Field(default=None, description="What came instead.")
    errors: list[FieldProblem] = Field(default_factory=list, description="One entry a wrong field.")
    request_id: str | None = Field(default=None, description="Also in the `X-Request-ID` header and the server's logs.")


class DomainError(Exception):
    """Base of every refusal that a caller can be told about; one handler turns it into a `Problem`.

    Raised by `persistence` and `cloud_api`, stored by `worker` as a run's or an assignment's reason.
    """

    def __init__(self, code: ErrorCode, detail: str, *, expected: Any = None, received: Any = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.expected = expected
        self.received = received
