import errno
import hashlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from instances import LEFT, box, content, photo, region, save, segment, small, tree
from PIL import Image

import wsss.data.instances
from wsss import InputError
from wsss.data.files import read_lines, read_mask
from wsss.data.instances import RULES, MaskReport, build_masks
from wsss.report import colour_map

# What the masks hold


@pytest.mark.parametrize("compressed", [False, True])
def test_masks_come_back_from_their_runs(tmp_path: Path, compressed: bool) -> None:
    draw = np.random.default_rng(0)
    sizes = [(1, 1), (1, 40), (37, 1), (30, 20), (64, 48), (7, 7)]
    masks = [draw.integers(0, 4, size).astype(np.uint8) for size in sizes]
    masks[3] = np.kron(draw.integers(0, 4, (3, 2)), np.ones((10, 10))).astype(np.uint8)
    masks[5][:] = 0
    values = {1: 3, 2: 7, 3: 90}
    number = itertools.count(1)
    annotations = [
        region(next(number), i, values[v], segment(mask == v, compressed))
        for i, mask in enumerate(masks)
        for v in np.unique(mask[mask > 0]).tolist()
    ]
    path = save(tmp_path / "a.json", content([photo(i, *m.shape) for i, m in enumerate(masks)], annotations))
    seen: list[tuple[int, int]] = []
    report = build_masks(path, tmp_path / "out" / "masks", progress=lambda *done: seen.append(done))
    for i, mask in enumerate(masks):
        file = tmp_path / "out" / "masks" / f"photo_{i}.png"
        assert np.array_equal(read_mask(file), mask)
        with Image.open(file) as image:
            assert image.mode == "P"
            assert image.palette is not None
            stored = image.palette.tobytes()
            assert stored == colour_map().tobytes()[: len(stored)]
    digest = hashlib.sha256()
    for i, mask in sorted(enumerate(masks), key=lambda pair: f"photo_{pair[0]}.png"):
        digest.update(f"photo_{i}.png\0{mask.shape[0]} {mask.shape[1]}\0".encode() + mask.tobytes())
    empty = sum(not mask.any() for mask in masks)
    expected = ("wsss", ("cat", "hot dog", "dog"), 6, 6, empty, len(annotations), 0, digest.hexdigest())
    assert report == MaskReport(*expected)
    assert seen == [(i, 6) for i in range(1, 7)]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "masks").iterdir()}
    assert build_masks(path, tmp_path / "out" / "masks") == MaskReport(*expected[:3], 0, *expected[4:])
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "masks").iterdir()}


def test_real_masks_come_back_from_their_runs(tmp_path: Path, real_data: Path) -> None:
    root = real_data / "msrc_v2"
    names = read_lines(root / "class_names.txt")
    files = sorted((root / "SegmentationClass").glob("*.png"))[::6]
    images, annotations = [], []
    for i, file in enumerate(files):
        mask = read_mask(file)
        images.append(photo(i, *mask.shape) | {"file_name": f"{file.stem}.jpg"})
        for v in np.unique(mask[mask > 0]).tolist():
            crowd = int(v == 255)
            shape = segment(mask == v, compressed=i % 2 == 0)
            annotations.append(region(1000 * i + v, i, 10 if crowd else 10 * v, shape, crowd))
    data = content(images, annotations, {10 * (c + 1): name for c, name in enumerate(names)})
    report = build_masks(save(tmp_path / "a.json", data), tmp_path / "out")
    assert report.classes == tuple(names)
    assert report.written == len(files) > 90
    assert report.crowds > 0
    for file in files:
        assert np.array_equal(read_mask(tmp_path / "out" / file.name), read_mask(file))


def inside(points: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which centres of pixels are inside a polygon (K, 2), by counting crossings, and how far all are from its line."""
    centres = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)[:, :, None] + 0.5  # (H, W, 1, 2)
    a, b = points, np.roll(points, -1, 0)
    beside = (a[:, 1] > centres[..., 1]) != (b[:, 1] > centres[..., 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        x = a[:, 0] + (centres[..., 1] - a[:, 1]) * (b - a)[:, 0] / (b - a)[:, 1]
    along = (((centres - a) * (b - a)).sum(-1) / ((b - a) ** 2).sum(-1)).clip(0, 1)
    distance = np.linalg.norm(centres - a - along[..., None] * (b - a), axis=-1)
    return (beside & (x > centres[..., 0])).sum(-1) % 2 == 1, distance.min(-1)


def test_polygons_agree_with_another_rasteriser_up_to_the_edge(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    polygons = []
    for corners in draw.integers(3, 40, 30):
        angle, radius = np.sort(draw.uniform(0, 2 * np.pi, corners)), draw.uniform(5, 45, corners)
        ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        polygons.append(draw.uniform(20, 60, 2) + ring)  # some reach beyond the image
    annotations = [region(i, i, 3, [polygon.ravel().tolist()]) for i, polygon in enumerate(polygons)]
    annotations += [region(99, 30, 3, [[1, 1, 9, 1, 9, 9, 1, 9], [20, 2, 30, 2, 30, 22, 20, 22]])]
    path = save(tmp_path / "a.json", content([photo(i, 64, 72) for i in range(31)], annotations))
    build_masks(path, tmp_path / "out")
    for i, polygon in enumerate(polygons):
        ours = read_mask(tmp_path / "out" / f"photo_{i}.png") == 1
        expected, distance = inside(polygon, 64, 72)
        assert (ours == expected)[distance > 1].all()
        assert (ours == expected).mean() > 0.95
    expected = np.zeros((64, 72), np.uint8)
    expected[1:9, 1:9] = expected[2:22, 20:30] = 1
    assert np.array_equal(read_mask(tmp_path / "out" / "photo_30.png"), expected)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("wsss", ["1 1 1 1 0", "1 1 1 1 255", "3 3 3 255 255", "3 3 3 255 255"]),
        ("file_order", ["3 3 3 1 0", "3 3 2 2 2", "3 3 2 2 2", "3 3 2 2 2"]),
        ("crowd_as_object", ["1 1 1 1 0", "1 1 1 1 2", "3 3 2 2 2", "3 3 2 2 2"]),
    ],
)
def test_rules(tmp_path: Path, rule: str, expected: list[str]) -> None:
    report = build_masks(save(tmp_path / "a.json", small()), tmp_path / "out", rule)
    assert read_mask(tmp_path / "out/photo_1.png").tolist() == [[int(v) for v in row.split()] for row in expected]
    assert read_mask(tmp_path / "out/photo_2.png").tolist() == [[2, 2, 0, 0, 0]] * 4
    assert read_mask(tmp_path / "out/photo_3.png").tolist() == [[0] * 5] * 4
    assert (report.rule, report.without_annotations, report.annotations, report.crowds) == (rule, 1, 4, 1)
    assert RULES[rule].__doc__


def test_of_equal_areas_the_higher_id_is_on_top(tmp_path: Path) -> None:
    halves = [region(5, 1, 3, box(slice(0, 2), slice(0, 5))), region(4, 1, 7, box(slice(1, 3), slice(0, 5)))]
    build_masks(save(tmp_path / "a.json", content([photo(1)], halves)), tmp_path / "out")
    assert read_mask(tmp_path / "out/photo_1.png")[:, 0].tolist() == [1, 1, 2, 0]


def test_area_is_counted_not_read(tmp_path: Path) -> None:
    data = small()
    for annotation, area in zip(data["annotations"], (99, 1, 5, 0), strict=True):
        annotation["area"] = area
    first = build_masks(save(tmp_path / "a.json", data), tmp_path / "a")
    assert first.sha256 == build_masks(save(tmp_path / "b.json", small()), tmp_path / "b").sha256


@pytest.mark.parametrize("rule", RULES)
def test_order_of_the_file(tmp_path: Path, rule: str) -> None:
    data = small()
    first = build_masks(save(tmp_path / "a.json", data), tmp_path / "a", rule)
    shuffled = {key: data[key] for key in ("categories", "annotations", "images")}
    for elements in shuffled.values():
        elements.reverse()
    second = build_masks(save(tmp_path / "b.json", shuffled), tmp_path / "b", rule)
    assert (first == second) == (rule != "file_order")
    assert (tree(tmp_path / "a") == tree(tmp_path / "b")) == (rule != "file_order")


# Runs that end early


def test_a_killed_run_is_finished(tmp_path: Path) -> None:
    data = content([photo(i) for i in range(20)], [region(i, i, 3, [LEFT]) for i in range(20)])
    path = save(tmp_path / "a.json", data)
    build_masks(path, tmp_path / "whole")
    code = f"""if True:
        import os, signal
        from wsss.data.instances import build_masks
        replace, calls = os.replace, []
        def deadly(*paths):
            calls.append(paths)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
        os.replace = deadly
        build_masks({str(path)!r}, {str(tmp_path / "out")!r})"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(tree(tmp_path / "out")) == 8  # seven masks and what was being written
    assert build_masks(path, tmp_path / "out").written == 13
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_mask_is_not_replaced(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", small())
    build_masks(path, tmp_path / "out", "file_order")
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match=r"photo_1\.png is there and is not what the rule wsss makes"):
        build_masks(path, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.json", small())

    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match=r"photo_1\.png cannot be written \(No space left on device\)"):
            build_masks(path, tmp_path / "out")
    assert tree(tmp_path / "out") == {}

    def tiny(name: str) -> sqlite3.Connection:
        connection = connect(name)
        connection.execute("PRAGMA max_page_count = 1")
        return connection

    connect = sqlite3.connect
    monkeypatch.setattr(wsss.data.instances.sqlite3, "connect", tiny)
    with pytest.raises(InputError, match=r"a\.json cannot be written \(.*full\): set SQLITE_TMPDIR"):
        build_masks(path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(InputError, match="cannot be written"):
        build_masks(path, tmp_path / "file")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path, draw, count = tmp_path / "a.json", random.Random(0), 8000
    with open(path, "w") as file:
        start = json.dumps(content([photo(i, 64, 64) for i in range(count)], [])).replace('"annotations": []', "")
        file.write(start[:-1].replace(", ,", ",") + ', "annotations": [')
        for i in itertools.count():
            shape = [[round(draw.random() * 64, 2) for _ in range(120)]]
            file.write((", " if i else "") + json.dumps(region(i, draw.randrange(count), 3, shape)))
            if file.tell() > 50e6:
                break
        file.write("]}")
    code = f"""if True:
        from pathlib import Path
        from wsss.data.instances import build_masks
        peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        before = peak()
        build_masks({str(path)!r}, {str(tmp_path / "out")!r})
        print((peak() - before) / 1024)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 60  # MiB
