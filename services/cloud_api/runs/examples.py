"""Runs as the documentation shows them."""

from datetime import timedelta

from cloud_api.devices.examples import TIME
from protocol.pages import Page
from protocol.proxy_settings import ProxySettings
from protocol.runs import Run, RunCreate, RunPause, RunRollback, RunStop, Traffic, Waiting
from protocol.statuses import RunStatus, WaitingFor
from protocol.strategies import CoPlmsSettings, FedCoLlmSettings, FedLoraSettings, StandaloneSettings

RUN_ID = "run_0197c0ffee00a1b2c3d4e5f60718"

RUN_REQUEST = RunCreate(
    name="assistants",
    strategy=CoPlmsSettings(),
    rounds=5,
    llm="Qwen/Qwen2.5-7B-Instruct",
    public_data="/data/public.jsonl",
    proxy=ProxySettings(source="prune", layers=4),
    min_updates=3,
    grace_seconds=60,
)
FED_LORA_REQUEST = RunCreate(
    name="federated", strategy=FedLoraSettings(), rounds=5, slm="Qwen/Qwen2.5-0.5B-Instruct", min_updates=3
)
FEDCOLLM_REQUEST = RunCreate(
    name="federated-co-tuning",
    strategy=FedCoLlmSettings(),
    rounds=5,
    llm="Qwen/Qwen2.5-7B-Instruct",
    slm="Qwen/Qwen2.5-0.5B-Instruct",
    public_data="/data/public.jsonl",
    min_updates=3,
)
STANDALONE_REQUEST = RunCreate(name="alone", strategy=StandaloneSettings(), rounds=1, min_updates=3)
RUN = Run(
    run_id=RUN_ID,
    name="assistants",
    status=RunStatus.RUNNING,
    status_reason="round 1 waits for 2 more updates",
    waiting=Waiting(what=WaitingFor.UPDATES, since=TIME, until=TIME + timedelta(hours=1)),
    config=RUN_REQUEST,
    current_round=1,
    latest_version=0,
    created_at=TIME,
)
STOPPED = RUN.model_copy(
    update={"status": RunStatus.STOPPED, "status_reason": "wrong data", "waiting": None, "finished_at": TIME}
)
PAUSED = RUN.model_copy(
    update={
        "status": RunStatus.PAUSED,
        "status_reason": "the worker is needed elsewhere",
        "waiting": Waiting(what=WaitingFor.OPERATOR, since=TIME, by="an operator"),
    }
)
PAUSE = RunPause(reason="the worker is needed elsewhere")
ROLLBACK = RunRollback(version=3, reason="version 4 repeats itself")
RUNS = Page[Run](items=[RUN], next_cursor=None)
STOP = RunStop(reason="wrong data")
TRAFFIC = Traffic(
    up={"adapter_delta": 1_048_576, "logits": 393_216, "metrics": 2048},
    down={"proxy_base": 52_428_800, "adapter": 1_048_576, "probe_set": 16_384, "assignment": 4096},
)
