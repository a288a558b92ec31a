"""Two halves of the work on many images, side by side: the network on one, what comes after it on those before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

AT_ONCE = 4
"""Images that are finished at the same time; each takes the memory of a CRF."""


class Beside(Generic[T, R]):
    """Finishes items in up to AT_ONCE threads, which share the processor's cores, while the caller goes on.

    What is made does not depend on their number.
    """

    def __init__(self) -> None:
        self.cores = torch.get_num_threads()
        self.workers = min(AT_ONCE, self.cores)
        self.running: deque[tuple[T, Future[R]]] = deque()
        # the cores of an operation are a setting of its thread
        self.pool = ThreadPoolExecutor(
            self.workers, "wsss-finish", torch.set_num_threads, (self.cores // self.workers,)
        )

    def add(self, item: T, finish: Callable[..., R], look: Callable[[T], object]) -> None:
        """`finish(item, look(item))`, whose first half is done at once; `result()` raises what either raises."""
        try:
            ended = self.pool.submit(finish, item, look(item))
        except Exception as error:
            ended = Future()
            ended.set_exception(error)
        self.running.append((item, ended))

    def ended(self, rest: bool = False) -> Iterator[tuple[T, "Future[R]"]]:
        """Items in their order with what came of them: all but as many as there are threads, or the rest, too."""
        while len(self.running) > (0 if rest else self.workers):
            yield self.running.popleft()

    def __enter__(self) -> "Beside[T, R]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits; after an exception only for what has begun."""
        self.pool.shutdown(cancel_futures=kind is not None)
        torch.set_num_threads(self.cores)  # new threads take the number that any has set last


def overlapped(
    items: Iterable[T], look: Callable[[T], S], finish: Callable[[T, S], R]
) -> Iterator[tuple[T, "Future[R]"]]:
    """`finish(item, look(item))` of all items, in their order; what either of them raises, `result()` raises.

    `look` runs in the caller's thread, one item after the other, `finish` in those of `Beside`.
    """
    with Beside[T, R]() as beside:
        for item in items:
            beside.add(item, finish, look)
            yield from beside.ended()
        yield from beside.ended(rest=True)
