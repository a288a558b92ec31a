"""Work on many images in two halves: masks one after the other, beside them the files of those before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

WORKERS = 4
"""Images that are finished at the same time."""


def overlapped(
    items: Iterable[T], make: Callable[[T], S], finish: Callable[[T, S], R]
) -> Iterator[tuple[T, "Future[R]"]]:
    """`finish(item, make(item))` of all items, in their order; what either of them raises, `result()` raises.

    `make` runs in the caller's thread, one item after the other, `finish` in others. Leave what torch computes on a
    processor to `make`: it takes all cores by itself, and threads that wait for one another in turn are slower.
    """
    running: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(WORKERS, "wsss-finish") as pool:
        try:
            for item in items:
                try:
                    ended = pool.submit(finish, item, make(item))
                except Exception as error:
                    ended = Future()
                    ended.set_exception(error)
                running.append((item, ended))
                if len(running) > WORKERS:
                    yield running.popleft()
            yield from running
        except BaseException:  # the caller has stopped: what has not begun need not
            pool.shutdown(wait=False, cancel_futures=True)
            raise
