"""The process beside a worker that kills it when it stands still; `stalls.Guard` starts it.

A process of its own, because what it is for leaves the worker itself without a way out: a native call that keeps the
interpreter's lock stops every thread, and without memory no thread can log, write to the database or even start. It
needs nothing but this file and a pipe: each message of eight bytes (a double) says for how many seconds from now the
worker may be silent, infinity that it need not speak. The pipe closes with the worker, and so does this process end.
"""

import math
import os
import select
import signal
import struct
import sys
import time

MESSAGE = struct.Struct("d")


def main() -> None:
    """Watch the parent until it is gone or has been silent for too long."""
    worker = os.getppid()
    allowed, heard_at = math.inf, time.monotonic()
    while True:
        left = heard_at + allowed - time.monotonic()
        readable, _, _ = select.select([0], [], [], None if math.isinf(left) else max(0.0, left))
        if readable:
            messages = os.read(0, 512 * MESSAGE.size)
            if not messages:
                return
            allowed, heard_at = MESSAGE.unpack(messages[-MESSAGE.size :])[0], time.monotonic()
        elif left <= 0:
            if os.getppid() == worker:
                event = (
                    f'{{"event": "worker_killed", "level": "error", "process": {worker}, "silent_seconds": {allowed}}}'
                )
                sys.stderr.write(f"{event}\n")
                sys.stderr.flush()
                os.kill(worker, signal.SIGKILL)
            return


if __name__ == "__main__":
    main()
