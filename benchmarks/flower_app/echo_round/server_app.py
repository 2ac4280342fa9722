"""The server: FedAvg over all clients, whose rounds begin when they are told to.

Round n begins when the file `go-<n>` is in the folder `turns`, so that another system can be measured between two
rounds; when it began and ended is written to `done-<n>`.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

LOOK_SECONDS = 0.01
app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that waits for its turn, and notes when each round began and ended."""

    def __init__(self, turns: Path, devices: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
        self._turns = turns
        self._started = 0.0

    def configure_train(self, server_round: int, *others: Any) -> Iterable[Message]:
        """Choose the clients, once it is the round's turn."""
        (self._turns / f"ready-{server_round}").touch()
        while not (self._turns / f"go-{server_round}").exists():
            time.sleep(LOOK_SECONDS)
        self._started = time.time()
        return super().configure_train(server_round, *others)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Average, and say that the round is over."""
        answers = list(replies)
        result = super().aggregate_train(server_round, answers)
        good = sum(not each.has_error() for each in answers)
        unfinished = self._turns / "unfinished"
        unfinished.write_text(json.dumps({"started": self._started, "ended": time.time(), "answers": good}))
        unfinished.replace(self._turns / f"done-{server_round}")
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the rounds that the run's configuration asks for."""
    config = context.run_config
    random = np.random.default_rng(0)
    shape = (int(config["rows"]), int(config["columns"]))
    arrays = [random.normal(size=shape).astype(np.float32) for _ in range(int(config["tensors"]))]
    strategy = TimedFedAvg(Path(str(config["turns"])), int(config["devices"]))
    strategy.start(grid, ArrayRecord(arrays), num_rounds=int(config["rounds"]))
