"""Calls that block, in threads of this process.

Starlette's `run_in_threadpool` does the same with anyio's threads, whose queues are written in Python. In a round of 20
devices that fetch and send 10 MiB each, that was a sixth of what the interpreter did.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from contextvars import copy_context
from typing import ParamSpec, TypeVar

import anyio

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

THREADS = 40
"""More than `Transactions` gives turns, or those who hold a connection could wait for ever for a thread to end with."""

_POOL = ThreadPoolExecutor(THREADS, thread_name_prefix="blocking")


async def in_thread(
    call: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
) -> Result:
    """Call in a thread, with this task's context variables, and return what it returned.

    A task that is cancelled meanwhile ends only when the call has: what that works with must stay open until then.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()
    over = asyncio.Event()
    context = copy_context()

    def fail(error: BaseException) -> None:
        over.set()
        if not answer.cancelled():
            answer.set_exception(error)

    def succeed(result: Result) -> None:
        over.set()
        if not answer.cancelled():
            answer.set_result(result)

    def work() -> None:
        try:
            result = context.run(call, *arguments, **keywords)
        except StopIteration as error:  # a future does not take it
            loop.call_soon_threadsafe(fail, RuntimeError(f"unexpected {error!r}"))
        except BaseException as error:
            loop.call_soon_threadsafe(fail, error)
        else:
            loop.call_soon_threadsafe(succeed, result)

    _POOL.submit(work)
    try:
        return await answer
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):  # or anyio would cancel this again and again
            while not over.is_set():
                with suppress(asyncio.CancelledError):
                    await over.wait()
        raise


@asynccontextmanager
async def entered_in_thread(manager: AbstractContextManager[Result]) -> AsyncIterator[Result]:
    """Enter and leave `manager` in threads. It must not swallow what is raised in it."""
    entered = await in_thread(manager.__enter__)
    try:
        yield entered
    except BaseException as error:
        await in_thread(manager.__exit__, type(error), error, error.__traceback__)
        raise
    await in_thread(manager.__exit__, None, None, None)
