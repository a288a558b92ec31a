"""Work of many images side by side."""

import threading
from itertools import count

from wsss.threads import WORKERS, overlapped


def test_results_are_in_order_whatever_finishes_first() -> None:
    """While the first one is not finished, others are: as many as there are threads."""
    made: list[tuple[int, threading.Thread]] = []
    finished: list[int] = []
    others = threading.Event()

    def make(item: int) -> int:
        made.append((item, threading.current_thread()))
        return 10 * item

    def finish(item: int, value: int) -> int:
        if item == 0:
            assert others.wait(60)
        finished.append(item)
        if item == WORKERS - 1:
            others.set()
        return value + 1

    results = [(item, ended.result()) for item, ended in overlapped(range(12), make, finish)]
    assert results == [(item, 10 * item + 1) for item in range(12)]
    assert made == [(item, threading.current_thread()) for item in range(12)]
    assert finished[0] != 0


def test_what_either_half_raises_is_the_result_of_its_item() -> None:
    ended = dict(overlapped(range(5), lambda item: 1 // (item - 1), lambda item, value: 1 // (item - 3)))
    assert list(ended) == list(range(5))
    assert [isinstance(one.exception(), ZeroDivisionError) for one in ended.values()] == [False, True] * 2 + [False]


def test_no_more_is_begun_than_is_asked_for() -> None:
    """Nor does anything run once the caller has gone."""
    made: list[int] = []
    results = overlapped(count(), lambda item: made.append(item), lambda item, value: item)
    assert [next(results)[1].result() for _ in range(3)] == [0, 1, 2]
    assert len(made) == 3 + WORKERS
    del results
    assert not any(thread.name.startswith("wsss-finish") for thread in threading.enumerate())
