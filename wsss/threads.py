"""Work on many images in two halves: masks one after the other, beside them the files of those before."""

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

WORKERS = 4
"""Images that are finished at the same time beside a GPU; two more are held in memory with what was made of them."""


def overlapped(
    items: Iterable[T], make: Callable[[T], S], finish: Callable[[T, S], R], device: torch.device
) -> Iterator[tuple[T, "Future[R]"]]:
    """`finish(item, make(item))` of all items, in their order; what either of them raises, `result()` raises.

    `make` runs in the caller's thread, one item after the other. Where it computes on a GPU, `finish` runs in threads
    beside it. On a processor it does not: there torch takes all cores, and its threads wait for one another while any
    of them does something else. Items that are not given out when `items` itself fails are lost.
    """
    running: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(WORKERS, "wsss-finish") as pool:
        submit, behind = (_at_once, 0) if device.type == "cpu" else (pool.submit, WORKERS)
        for item in items:
            try:
                ended: Future[R] = submit(finish, item, make(item))
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they would hold its tensors while others are made
                ended = Future()
                ended.set_exception(error)
            running.append((item, ended))
            if len(running) > behind:
                yield running.popleft()
        yield from running


def _at_once(work: Callable[..., R], *given: object) -> "Future[R]":
    ended: Future[R] = Future()
    ended.set_result(work(*given))
    return ended
