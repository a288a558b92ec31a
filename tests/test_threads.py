"""Work of many images side by side."""

import json
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Ended, content

from wsss.threads import AT_ONCE, overlapped


@pytest.fixture(params=[1, 3, 9])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param  # as it was
    torch.set_num_threads(before)


def test_results_are_in_order_whatever_finishes_first(cores: int) -> None:
    """While the first one is not finished, others are: as many as there are threads."""
    workers, looked, finished = min(cores, AT_ONCE), [], []
    last_of_first = threading.Event()

    def look(item: int) -> int:
        looked.append((item, threading.current_thread()))
        return 10 * item

    def finish(item: int, seen: int) -> tuple[int, int]:
        if item == 0 and workers > 1:
            assert last_of_first.wait(60)
        finished.append(item)
        if item == workers - 1:
            last_of_first.set()
        return seen + 1, torch.get_num_threads()

    results = [(item, ended.result()) for item, ended in overlapped(range(12), look, finish)]
    assert results == [(item, (10 * item + 1, cores // workers)) for item in range(12)]
    assert looked == [(item, threading.current_thread()) for item in range(12)]
    assert (finished[0] == 0) == (workers == 1)


def test_what_either_half_raises_is_the_result_of_its_item(cores: int) -> None:
    def look(item: int) -> int:
        return 1 // (item - 1)

    def finish(item: int, seen: int) -> int:
        return 1 // (item - 3)

    ended = dict(overlapped(range(5), look, finish))
    assert list(ended) == list(range(5))
    assert [isinstance(one.exception(), ZeroDivisionError) for one in ended.values()] == [False, True] * 2 + [False]


def test_no_more_is_begun_than_is_asked_for(cores: int) -> None:
    """Nor does anything run once the caller has gone."""
    looked: list[int] = []
    results = overlapped(count(), lambda item: looked.append(item), lambda item, seen: item)
    assert [next(results)[1].result() for _ in range(3)] == [0, 1, 2]
    assert len(looked) == 3 + min(cores, AT_ONCE)
    del results
    assert not any(thread.name.startswith("finish") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [2, 8])
def test_what_is_made_does_not_depend_on_threads(
    command: Callable[..., Ended], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Masks, figures and counts of each image are those of one thread, which waits for each of its CRFs."""
    given = f"checkpoint={trained / 'checkpoints/last.ckpt'}"
    label = ("refine=crf", "refine.alpha=[4,32]", "scores=true", "cams=true", "num_workers=0")
    evaluation = ("protocol.extras={flip: sum, crf: {iterations: 3}}", "detail=true", "data.num_workers=0")
    out: dict[str, Any] = {}
    for name, number in (("alone", 1), ("beside", threads)):
        torch.set_num_threads(number)
        try:
            with monkeypatch.context() as patch:
                if name == "alone":
                    patch.setattr("wsss.methods.evaluated.Beside", lambda: None)
                made = [command("label", given, *label, f"out={tmp_path / name}")]
                made += [command("eval", given, *evaluation, f"hydra.run.dir={tmp_path / name / 'eval'}")]
        finally:
            torch.set_num_threads(1)
        assert [ended.code for ended in made] == [0, 0], made
        out[name] = content(tmp_path / name)
    assert json.loads(out["alone"]["eval/metrics.json"])["val/crf_miou"] > 0
    assert len(out["alone"]["eval/per_image.csv"].splitlines()) > 4 * 3
    same = [path for path in out["alone"] if not path.endswith(("run.json", "config.yaml"))]
    assert {path for path in same if out["alone"][path] != out["beside"][path]} == set()
