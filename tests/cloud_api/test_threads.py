import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pytest

from cloud_api.threads import entered_in_thread, in_thread

PATIENCE_SECONDS = 30
REQUEST: ContextVar[str] = ContextVar("REQUEST")


def test_a_call_gets_its_arguments_and_the_task_s_context_and_runs_in_another_thread() -> None:
    def call(first: int, *, second: int) -> tuple[int, str, bool]:
        return first + second, REQUEST.get(), threading.current_thread() is threading.main_thread()

    async def main() -> tuple[int, str, bool]:
        REQUEST.set("request-1")
        return await in_thread(call, 1, second=2)

    assert asyncio.run(main()) == (3, "request-1", False)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ValueError("a reason"), ValueError), (StopIteration("a reason"), RuntimeError)],
    ids=["value", "stop"],
)
def test_what_a_call_raises_is_raised_in_the_task(raised: Exception, expected: type[Exception]) -> None:
    def call() -> None:
        raise raised

    async def main() -> None:
        await asyncio.wait_for(in_thread(call), PATIENCE_SECONDS)

    with pytest.raises(expected, match="a reason"):
        asyncio.run(main())


@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_task_ends_only_when_its_call_has_ended(times: int) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        assert may_end.wait(PATIENCE_SECONDS)
        ended.set()

    async def main() -> None:
        task = asyncio.create_task(in_thread(call))
        await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(main())


def test_a_time_out_of_a_call_is_one() -> None:
    may_end = threading.Event()

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.2, may_end.set)
        async with asyncio.timeout(0.05):
            await in_thread(may_end.wait, PATIENCE_SECONDS)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert may_end.is_set()


def test_a_manager_is_entered_and_left_in_threads_and_told_of_errors() -> None:
    seen: list[str] = []

    @contextmanager
    def manager() -> Iterator[int]:
        assert threading.current_thread() is not threading.main_thread()
        try:
            yield 7
        except ValueError as error:
            seen.append(str(error))
            raise
        finally:
            assert threading.current_thread() is not threading.main_thread()
            seen.append("left")

    async def main(reason: str) -> None:
        async with entered_in_thread(manager()) as entered:
            assert entered == 7
            if reason:
                raise ValueError(reason)

    asyncio.run(main(""))
    assert seen == ["left"]
    with pytest.raises(ValueError, match="a reason"):
        asyncio.run(main("a reason"))
    assert seen == ["left", "a reason", "left"]
