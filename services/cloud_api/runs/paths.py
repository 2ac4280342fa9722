"""Refuses a run whose model folders or data files are not there, before anybody waits for it.

A value that looks like a path (absolute, or beginning with `.` or `~`) or that exists is one; anything else may be a
Hugging Face hub name, which only the worker can tell. The API is expected to see the same folders as the worker.
"""

from pathlib import Path

from protocol.errors import DomainError, ErrorCode
from protocol.runs import RunCreate

MODEL_CONFIG = "config.json"


def check_paths(request: RunCreate) -> None:
    """See that the paths in a run's configuration lead somewhere.

    Raises:
        DomainError: MODEL_FOLDER_MISSING or DATA_FILE_INVALID, with the field and the path.
    """
    _check_model("llm", request.llm)
    _check_model("slm", request.slm)
    _check_model("proxy.path", request.proxy.path)
    _check_data("public_data", request.public_data)
    _check_data("evaluation_data", request.evaluation_data)


def _check_model(field: str, value: str | None) -> None:
    path = _as_path(value)
    if path is None or (path / MODEL_CONFIG).is_file():
        return
    came = "a folder without it" if path.is_dir() else "a file" if path.exists() else "nothing there"
    raise DomainError(
        ErrorCode.MODEL_FOLDER_MISSING,
        f"`{field}` is {value!r}: expected a model folder with {MODEL_CONFIG}, weights and a tokenizer, got {came}",
        expected=f"a folder with {MODEL_CONFIG}",
        received=value,
    )


def _check_data(field: str, value: str | None) -> None:
    path = _as_path(value)
    if path is None or path.exists():
        return
    raise DomainError(
        ErrorCode.DATA_FILE_INVALID,
        f"`{field}` is {value!r}: expected a data file or folder, got nothing there",
        expected="a data file or folder",
        received=value,
    )


def _as_path(value: str | None) -> Path | None:
    """Return the path that a value is; None for nothing and for what may be a hub name."""
    if not value or "\0" in value:
        return None
    path = Path(value).expanduser()
    return path if value.startswith((".", "~")) or path.is_absolute() or path.exists() else None
