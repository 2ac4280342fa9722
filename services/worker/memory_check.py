"""Says before anything large is loaded whether a run's training fits into this machine's memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
import torch

from assets.devices import available_memory
from assets.errors import ModelFolderError
from assets.models import read_config, read_tokenizer
from cotuning.examples import Example
from cotuning.memory import (
    CannotEstimate,
    MemoryEstimate,
    NotEnoughMemory,
    estimate_memory,
    longest_row,
    require_memory,
)
from cotuning.proxy_creation import proxy_config
from protocol.errors import DomainError, ErrorCode
from protocol.runs import ProxySettings, RunCreate
from protocol.strategies import CoPlmsSettings

log = structlog.get_logger("worker.memory_check")


def check_memory(
    config: RunCreate, settings: CoPlmsSettings, rows: Sequence[Example], available: Mapping[str, int] | None = None
) -> None:
    """Compare what the proxy's distillation and the server's mutual learning will need with what there is.

    Args:
        config: of the run.
        settings: of its strategy.
        rows: public rows to train on.
        available: bytes by device; this machine's if not given.

    Raises:
        DomainError: NOT_ENOUGH_MEMORY; MODEL_FOLDER_MISSING.
    """
    if not config.llm_loading.check_memory:
        return
    assert config.llm is not None
    try:
        llm, tokenizer = read_config(config.llm), read_tokenizer(config.llm)
        proxy = _proxy_config(llm, config.proxy)
    except ModelFolderError as error:
        raise DomainError(ErrorCode.MODEL_FOLDER_MISSING, str(error), received=config.llm) from error
    length = longest_row(tokenizer, rows, max_length=max(config.proxy.max_length, settings.server.max_length))
    available = available or available_memory(config.llm_loading.devices)
    try:
        stages = {
            "distillation": _distillation(llm, proxy, config, length),
            "mutual learning": _mutual_learning(llm, proxy, config, settings, length),
        }
    except CannotEstimate as error:
        log.warning("memory_not_estimated", reason=str(error))
        return
    for stage, estimates in stages.items():
        try:
            require_memory(estimates, available)
        except NotEnoughMemory as error:
            raise DomainError(
                ErrorCode.NOT_ENOUGH_MEMORY,
                f"{stage}: {error}",
                expected=error.expected_bytes,
                received=error.available_bytes,
            ) from error


def _distillation(llm: Any, proxy: Any, config: RunCreate, longest: int) -> dict[str, MemoryEstimate]:
    settings = config.proxy
    batch: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "length": min(longest, settings.max_length),
        "precision": settings.precision,
    }
    checkpointing = settings.gradient_checkpointing
    return {
        "llm": estimate_memory(llm, learns="nothing", **_held(config), **batch),
        "proxy": estimate_memory(proxy, learns="everything", gradient_checkpointing=checkpointing, **batch),
    }


def _mutual_learning(
    llm: Any, proxy: Any, config: RunCreate, settings: CoPlmsSettings, longest: int
) -> dict[str, MemoryEstimate]:
    server = settings.server
    options: dict[str, Any] = {
        "learns": "adapter",
        "batch_size": server.rows_at_once,
        "length": min(longest, server.max_length),
        "precision": server.precision,
        "gradient_checkpointing": server.gradient_checkpointing,
    }
    return {
        "llm": estimate_memory(llm, rank=settings.llm_lora.rank, **_held(config), **options),
        "proxy": estimate_memory(proxy, rank=settings.proxy_lora.rank, **options),
    }


def _held(config: RunCreate) -> dict[str, Any]:
    return {"dtype": getattr(torch, config.llm_loading.dtype), "four_bit": config.llm_loading.four_bit}


def _proxy_config(llm: Any, settings: ProxySettings) -> Any:
    if settings.source == "pretrained":
        assert settings.path is not None
        return read_config(settings.path)
    return proxy_config(llm, source=settings.source, layers=settings.layers, hidden_size=settings.hidden_size)
