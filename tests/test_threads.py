"""Work of many images side by side."""

import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from tiny import Ended, content

from wsss.threads import WORKERS, overlapped

GPU, PROCESSOR = torch.device("cuda"), torch.device("cpu")


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

    results = [(item, ended.result()) for item, ended in overlapped(range(12), make, finish, GPU)]
    assert results == [(item, 10 * item + 1) for item in range(12)]
    assert made == [(item, threading.current_thread()) for item in range(12)]
    assert finished[0] != 0


@pytest.mark.parametrize("device", [GPU, PROCESSOR])
def test_what_either_half_raises_is_the_result_of_its_item(device: torch.device) -> None:
    ended = dict(overlapped(range(5), lambda item: 1 // (item - 1), lambda item, value: 1 // (item - 3), device))
    assert list(ended) == list(range(5))
    assert [isinstance(one.exception(), ZeroDivisionError) for one in ended.values()] == [False, True] * 2 + [False]


def test_no_more_is_begun_than_is_asked_for() -> None:
    """Nor does anything run once the caller has gone."""
    made: list[int] = []
    results = overlapped(count(), lambda item: made.append(item), lambda item, value: item, GPU)
    assert [next(results)[1].result() for _ in range(3)] == [0, 1, 2]
    assert len(made) == 3 + WORKERS
    del results
    assert not any(thread.name.startswith("wsss-finish") for thread in threading.enumerate())


def test_on_a_processor_one_thing_follows_the_other() -> None:
    done: list[tuple[str, int]] = []
    results = overlapped(
        range(3), lambda item: done.append(("make", item)), lambda item, value: done.append(("finish", item)), PROCESSOR
    )
    for item, _ in results:
        assert done == [(word, number) for number in range(item + 1) for word in ("make", "finish")]


def test_threads_change_no_file(
    command: Callable[..., Ended], trained: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU, with an image that cannot be read among others."""
    (photographs / "im Urlaub/Bild 3 (groß).JPG").write_bytes(b"\xff\xd8\xff")
    checkpoint = f"checkpoint={trained / 'checkpoints/last.ckpt'}"
    said = []
    for name in ("alone", "beside"):
        if name == "beside":
            monkeypatch.setattr("wsss.threads.overlapped", lambda a, b, c, device: overlapped(a, b, c, GPU))
        label = ("refine=crf", "refine.alpha=[4,32]", "scores=true", "cams=true", "overlay=true", "output=tar")
        ended = command("label", checkpoint, *label, f"out={tmp_path / name / 'label'}")
        assert ended.code == 0, ended.err
        ended = command(
            "predict", checkpoint, f"images={photographs}", "cam=true", f"out={tmp_path / name / 'predict'}"
        )
        assert ended.code == 2
        said.append(ended.err.replace(name, ""))
    assert content(tmp_path / "alone") == content(tmp_path / "beside")
    assert said[0] == said[1]
    assert "Bild 3" in said[0]
