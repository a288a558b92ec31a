"""Work of many images side by side."""

import threading
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Ended, content

from wsss import InputError
from wsss.commands.label import make_one
from wsss.threads import WORKERS, overlapped

GPU, PROCESSOR = torch.device("cuda"), torch.device("cpu")
BOTH = pytest.mark.parametrize("device", [GPU, PROCESSOR])


def test_beside_a_gpu_as_many_are_finished_at_once_as_there_are_threads() -> None:
    """Results are in order all the same, whatever finishes first."""
    made: list[tuple[int, threading.Thread]] = []
    all_of_them, others = threading.Barrier(WORKERS), threading.Barrier(WORKERS)
    finished: list[int] = []

    def make(item: int) -> int:
        made.append((item, threading.current_thread()))
        return 10 * item

    def finish(item: int, value: int) -> int:
        if item < WORKERS:
            all_of_them.wait(60)
        if item == 0:
            others.wait(60)
        finished.append(item)
        if 0 < item < WORKERS:
            others.wait(60)
        return value + 1

    results = [(item, ended.result()) for item, ended in overlapped(range(12), make, finish, GPU)]
    assert results == [(item, 10 * item + 1) for item in range(12)]
    assert made == [(item, threading.current_thread()) for item in range(12)]
    assert finished.index(0) >= WORKERS - 1


def test_on_a_processor_one_thing_follows_the_other() -> None:
    done: list[tuple[str, int]] = []
    results = overlapped(
        range(3), lambda item: done.append(("make", item)), lambda item, value: done.append(("finish", item)), PROCESSOR
    )
    for item, _ in results:
        assert done == [(word, number) for number in range(item + 1) for word in ("make", "finish")]
    assert len(done) == 6


@BOTH
def test_what_either_half_raises_is_the_result_of_its_item(device: torch.device) -> None:
    ended = dict(overlapped(range(5), lambda item: 1 // (item - 1), lambda item, value: 1 // (item - 3), device))
    assert list(ended) == list(range(5))
    assert [isinstance(one.exception(), ZeroDivisionError) for one in ended.values()] == [False, True] * 2 + [False]


@BOTH
def test_one_that_has_failed_holds_no_memory_of_those_that_follow(device: torch.device) -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def make(item: int) -> int:
        assert not any(one() is not None for one in held)
        if item == 1:
            large = np.zeros(9)
            held.append(weakref.ref(large))
            raise MemoryError
        return item

    ended = [one for _, one in overlapped(range(9), make, lambda item, value: value, device)]
    assert [type(one.exception()) for one in ended[:3]] == [type(None), MemoryError, type(None)]
    assert len(held) == 1


def test_no_more_is_begun_than_is_asked_for() -> None:
    """Nor is a thread left once the caller has gone."""
    made: list[int] = []
    results = overlapped(count(), lambda item: made.append(item), lambda item, value: item, GPU)
    assert [next(results)[1].result() for _ in range(3)] == [0, 1, 2]
    assert len(made) == 3 + WORKERS
    del results
    assert not any(thread.name.startswith("wsss-finish") for thread in threading.enumerate())


def test_threads_change_no_file(
    command: Callable[..., Ended], trained: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an image that cannot be read among others."""
    checkpoint = f"checkpoint={trained / 'checkpoints/last.ckpt'}"
    label = ("refine=crf", "refine.alpha=[4,32]", "scores=true", "cams=true", "overlay=true", "output=tar")
    (photographs / "im Urlaub/Bild 3 (groß).JPG").write_bytes(b"\xff\xd8\xff")

    def make(method: Any, refine: Any, item: Any, *given: Any) -> Any:
        if item["id"].endswith("3"):
            raise InputError("it is too small")
        return make_one(method, refine, item, *given)

    monkeypatch.setattr("wsss.commands.label.make_one", make)
    said, used = [], []
    for name, device in (("alone", PROCESSOR), ("beside", GPU)):

        def chosen(a: Any, b: Any, c: Any, _: torch.device, device: torch.device = device) -> Any:
            used.append(device)
            return overlapped(a, b, c, device)

        monkeypatch.setattr("wsss.threads.overlapped", chosen)
        for fault, *words in (
            ("train-000003: it is too small", "label", *label, f"out={tmp_path / name / 'label'}"),
            ("Bild 3", "predict", f"images={photographs}", "cam=true", f"out={tmp_path / name / 'predict'}"),
        ):
            ended = command(words[0], checkpoint, *words[1:])
            assert (ended.code, fault in ended.err) == (2, True), ended.err
            said.append(ended.err.replace(name, ""))
    assert content(tmp_path / "alone") == content(tmp_path / "beside")
    assert said[:2] == said[2:]
    assert used == [PROCESSOR, PROCESSOR, GPU, GPU]
