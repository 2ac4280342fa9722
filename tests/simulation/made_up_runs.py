"""Runs made up for the tests of the cache and the report: two devices, an LLM and a proxy, no model anywhere."""

import numpy as np

from simulation.budget import Cost, RoundTraffic
from simulation.run_results import LLM, PROXY, RoundScores, RunKey, RunResult
from simulation.scores import METRICS, RowScores
from tests.simulation.observations import scores_of

DEVICES = ("phone", "laptop")
SETS = ("units", "web")
"""The domain of the laptop and that of the phone."""
OWN = {"phone": "web", "laptop": "units"}
NUM_ROWS = 40


def made_up_run(strategy: str, seed: int, level: float, *, llm_level: float = 60.0, megabytes: int = 1) -> RunResult:
    """A run whose models score about `level` in Rouge-L; its rows and seeds differ like those of other strategies."""

    def scores(model: str, rows: str, mean: float) -> RowScores:
        # What makes a row hard is the same for every strategy; a little is not.
        hard = np.random.default_rng([1, SETS.index(rows)]).normal(0, 15, NUM_ROWS)
        own = np.random.default_rng([2, seed, len(strategy), len(model)]).normal(0, 2, NUM_ROWS)
        return scores_of(np.clip(mean + seed + hard + own, 0, 100).round(4).tolist(), rows)

    found = {
        device: {rows: scores(device, rows, level if OWN[device] == rows else level / 2) for rows in SETS}
        for device in DEVICES
    }
    for model in (LLM, PROXY):
        found[model] = {rows: scores(model, rows, llm_level) for rows in SETS}
    traffic = [RoundTraffic(round=0, devices=2, down={"proxy_base": 5_000_000})] if megabytes else []
    traffic += [
        RoundTraffic(
            round=number,
            devices=2,
            up={"adapter_delta": 2_000_000 * megabytes} if megabytes else {},
            down={"shared_adapter": 2_000_000 * megabytes} if megabytes else {},
        )
        for number in (1, 2)
    ]
    return RunResult(
        key=RunKey(strategy=strategy, seed=seed),
        own=OWN,
        scores=found,
        rounds=tuple(
            RoundScores(
                round=number,
                scores={
                    device: {metric: found[device][OWN[device]].mean(metric) + number for metric in METRICS}
                    for device in DEVICES
                },
            )
            for number in (0, 1, 2)
        ),
        cost=Cost(
            steps={"phone": 60, "laptop": 60},
            wall_seconds={"devices": 10.0},
            cpu_seconds={"devices": 8.0 + seed},
            peak_memory_bytes={"devices": 500_000_000 + seed},
            traffic=tuple(traffic),
        ),
    )
