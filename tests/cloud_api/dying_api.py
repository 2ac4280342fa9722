"""The API's process, killed at one system call: `python dying_api.py link:after:2 --port 0` gets SIGKILL (as `kill -9`,
nothing is flushed, closed or rolled back) right after it has made its second hard link in the blob store.

A program of its own, so that what serves knows nothing of it.
"""

import itertools
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

STORE = ("/staged/", "/objects/")
"""Of the blob store; the same calls elsewhere do not count."""


def die_at(module: Any, name: str, when: str, number: int) -> None:
    """Replace `module.name` by one that kills this process `before` or `after` its call of that number in the store."""
    call: Callable[..., Any] = getattr(module, name)
    calls = itertools.count(1)

    def deadly(*arguments: Any, **named: Any) -> Any:
        counts = any(part in str(argument) for argument in arguments for part in STORE) and next(calls) == number
        if counts and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **named)
        if counts:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


if __name__ == "__main__":
    name, when, number = sys.argv.pop(1).split(":")
    die_at(shutil if name == "rmtree" else os, name, when, int(number))
    runpy.run_module("cloud_api", run_name="__main__", alter_sys=True)
