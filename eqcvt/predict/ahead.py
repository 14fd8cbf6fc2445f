"""Threads that work ahead of the one that asks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """The last thing in a task's queue, and the error that ended the task."""

    error: BaseException | None = None


def ahead(
    tasks: Iterable[Generator[T, None, None]], *, threads: int, depth: int = 8
) -> Iterator[T]:
    """Yield what the tasks yield, one task after the other, while threads work on the next ones.

    Args:
        tasks: generators; each runs in one thread, from its beginning to its end.
        threads: how many run at a time.
        depth: results that each may have in store.

    Raises:
        Whatever a task raises, after its results and those of the tasks before it.
    """
    stop = threading.Event()
    pending: deque[Queue[Any]] = deque()
    coming = iter(tasks)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                # As many again wait for a thread, so that none idles while the first is emptied.
                while len(pending) < 2 * threads and (task := next(coming, None)) is not None:
                    pending.append(Queue(depth + 1))  # and its end
                    pool.submit(_fill, task, pending[-1], stop)
                if not pending:
                    return
                queue = pending.popleft()
                while not isinstance(item := queue.get(), _End):
                    yield item
                if item.error is not None:
                    raise item.error
        finally:
            stop.set()


def _fill(task: Generator[Any, None, None], queue: Queue[Any], stop: threading.Event) -> None:
    """Put a task's results into its queue, until nobody takes them any more."""
    end = _End()
    try:
        with closing(task):
            for item in task:
                if not _put(queue, item, stop):
                    return
    except BaseException as error:  # it belongs to the thread that asks
        end = _End(error)
    _put(queue, end, stop)


def _put(queue: Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Wait for a free place; return False once nobody will make one."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.1)
        except Full:
            continue
        return True
    return False
