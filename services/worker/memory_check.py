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
from protocol.runs import RunCreate
from protocol.strategies import ServerSteps, SmallModel, spec_of

log = structlog.get_logger("worker.memory_check")


def check_memory(config: RunCreate, rows: Sequence[Example], available: Mapping[str, int] | None = None) -> None:
    """Compare what the proxy's distillation and the server's step will need with what there is.

    Args:
        config: of the run.
        rows: public rows to train on.
        available: bytes by device; this machine's if not given.

    Raises:
        DomainError: NOT_ENOUGH_MEMORY; MODEL_FOLDER_MISSING.
    """
    if not config.llm_loading.check_memory or config.llm is None:
        return
    server = config.strategy.server_steps
    lengths = [config.proxy.max_length, *([server.max_length] if server is not None else [])]
    try:
        llm, tokenizer = read_config(config.llm), read_tokenizer(config.llm)
        small = _small_config(llm, config)
    except ModelFolderError as error:
        raise DomainError(ErrorCode.MODEL_FOLDER_MISSING, str(error), received=config.llm) from error
    length = longest_row(tokenizer, rows, max_length=max(lengths))
    available = available or available_memory(config.llm_loading.devices)
    stages = {}
    try:
        if spec_of(config.strategy).small_model is SmallModel.DISTILLED_PROXY:
            stages["distillation"] = _distillation(llm, small, config, length)
        if server is not None:
            stages["mutual learning"] = _mutual_learning(llm, small, config, server, length)
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
    llm: Any, small: Any, config: RunCreate, server: ServerSteps, longest: int
) -> dict[str, MemoryEstimate]:
    options: dict[str, Any] = {
        "learns": "adapter",
        "batch_size": server.rows_at_once,
        "length": min(longest, server.max_length),
        "precision": server.precision,
        "gradient_checkpointing": server.gradient_checkpointing,
    }
    settings, estimates = config.strategy, {}
    if settings.trained_llm_lora is not None:
        estimates["llm"] = estimate_memory(llm, rank=settings.trained_llm_lora.rank, **_held(config), **options)
    if settings.shared_lora is not None and small is not None:
        estimates["proxy"] = estimate_memory(small, rank=settings.shared_lora.rank, **options)
    return estimates


def _held(config: RunCreate) -> dict[str, Any]:
    return {"dtype": getattr(torch, config.llm_loading.dtype), "four_bit": config.llm_loading.four_bit}


def _small_config(llm: Any, config: RunCreate) -> Any:
    """Of the shared small model; None where there is none."""
    small_model = spec_of(config.strategy).small_model
    if small_model is SmallModel.NONE:
        return None
    if small_model is SmallModel.DEVICES_OWN:
        assert config.slm is not None
        return read_config(config.slm)
    settings = config.proxy
    if settings.source == "pretrained":
        assert settings.path is not None
        return read_config(settings.path)
    return proxy_config(llm, source=settings.source, layers=settings.layers, hidden_size=settings.hidden_size)
