import copy
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from instances import LEFT, box, content, photo, region, save, segment, small, tree
from PIL import Image
from pycocotools import mask as rle

from wsss import InputError
from wsss.data.files import read_lines, read_mask
from wsss.data.instances import MAX_PIXELS
from wsss.prepare import coco
from wsss.prepare.coco import MAX_OUTLINE, RULES, MaskReport, build_masks
from wsss.writing import palette

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
            stored = bytes(image.getpalette() or ())
            assert stored == palette().tobytes()[: len(stored)]
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
        from wsss.prepare.coco import build_masks
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
    made = {name: data for name, data in tree(tmp_path / "out").items() if not name.startswith(".")}
    assert made == tree(tmp_path / "whole")


def test_another_mask_is_not_replaced(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", small())
    build_masks(path, tmp_path / "out", "file_order")
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match=r"photo_1\.png is there and is not what the rule wsss makes"):
        build_masks(path, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.json", small())

    def full(self: Image.Image, file: BinaryIO, *_: Any) -> None:
        file.write(b"\x89PNG")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(InputError, match=r"photo_1\.png cannot be written \(No space left on device\)"):
            build_masks(path, tmp_path / "out")
    assert tree(tmp_path / "out") == {}

    def tiny(name: str) -> sqlite3.Connection:
        connection = connect(name)
        connection.execute("PRAGMA max_page_count = 1")
        return connection

    connect = sqlite3.connect
    monkeypatch.setattr(coco.sqlite3, "connect", tiny)
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
        from wsss.prepare.coco import build_masks
        peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        before = peak()
        build_masks({str(path)!r}, {str(tmp_path / "out")!r})
        print((peak() - before) / 1024)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 60  # MiB


# Files that cannot be used: one sentence, or the right masks, never a traceback


def changed(change: Callable[[Any], object]) -> str:
    data = small()
    change(data)
    return json.dumps(data)


def put(section: str, place: int, **values: Any) -> Callable[[Any], object]:
    return lambda data: data[section][place].update(values)


def polygon(*numbers: Any) -> Callable[[Any], object]:
    return put("annotations", 3, segmentation=[list(numbers)])


def runs(counts: Any, size: Any = (4, 5)) -> Callable[[Any], object]:
    return put("annotations", 0, segmentation={"counts": counts, "size": size})


FAR = MAX_OUTLINE + 1
ZIGZAG = [n for i in range(600) for n in (0, 0, 999, i)]
BAD: list[tuple[Any, tuple[str, ...]]] = [
    (b"", ("not whole JSON after the start",)),
    (b"\xff\xfe", ("not whole JSON",)),
    (changed(lambda data: None)[:-2], ("not whole JSON after id 7 of its categories",)),
    (changed(lambda data: None).split(', {"id": 14')[0], ("not whole JSON after id 13 of its annotations",)),
    (changed(polygon(float("nan"), 0, 2, 0, 2, 4)), ("not whole JSON after id 14 of its annotations",)),
    (changed(polygon(1, 0, 2, 0, 2, 4)).replace("[[1", "[[1e999"), ("not whole JSON after id 14 of its annotations",)),
    (b"[" * 100_000, ("nested more than 16 deep",)),
    ("[1]", ("no list of images, annotations, categories",)),
    ("7", ("no list of images",)),
    (changed(lambda data: data.pop("annotations")), ("no list of annotations,",)),
    (changed(lambda data: data.update(annotations=None)), ("no list of annotations,",)),
    (changed(lambda data: data.update(annotations={"item": {}})), ("no list of annotations,",)),
    (changed(lambda data: None)[:-1] + ', "images": []}', ("images twice",)),
    (changed(lambda data: data.update(images=[])), ("no image",)),
    (changed(lambda data: data.update(images=[3])), ("id None in image number 0",)),
    (changed(put("images", 1, id=1)), ("image 1 twice",)),
    (changed(put("images", 1, id="1")), ("id '1' in image number 1, expected int",)),
    (changed(put("images", 1, id=True)), ("id True in image number 1, expected int",)),
    (changed(put("images", 1, file_name="photo_1.png")), ("images 1 and 2 both named photo_1",)),
    *(
        (changed(put("images", 1, file_name=n)), ("image 2", "without folders"))
        for n in ("../a.jpg", "a\\b", "", "a\0")
    ),
    (changed(put("images", 1, file_name=None)), ("file_name None in image 2",)),
    (changed(put("images", 1, height=-4)), ("height -4", "image 2")),
    (changed(put("images", 1, height=0)), ("height 0", "image 2")),
    (changed(put("images", 1, width=5.0)), ("width 5.0", "image 2")),
    (changed(put("images", 1, width=10**9)), ("width 1000000000", "image 2", f"{MAX_PIXELS} pixels")),
    (changed(put("images", 1, width=10**9, height=10**9)), ("image 2", f"{MAX_PIXELS} pixels")),
    (changed(lambda data: data.update(categories=[])), ("0 categories",)),
    (changed(put("categories", 1, id=3)), ("category 3 twice",)),
    (changed(put("categories", 1, name=None)), ("name None in category 90",)),
    (changed(lambda data: data["annotations"].append(None)), ("id None in annotation number 4",)),
    (changed(lambda data: data["annotations"][2].pop("id")), ("id None in annotation number 2",)),
    (changed(put("annotations", 1, id=12)), ("annotation 12 twice",)),
    (changed(put("annotations", 1, id=2**63)), ("a.json",)),
    (changed(put("annotations", 1, image_id=9)), ("unknown image_id 9 in annotation 11",)),
    (changed(put("annotations", 1, image_id=[1])), ("image_id [1] in annotation 11, expected int",)),
    (changed(put("annotations", 1, category_id=1)), ("unknown category_id 1 in annotation 11",)),
    (changed(put("annotations", 1, iscrowd=2)), ("iscrowd 2 in annotation 11",)),
    (changed(put("annotations", 1, iscrowd=None)), ("iscrowd None in annotation 11",)),
    (changed(put("annotations", 1, segmentation=None)), ("segmentation None", "annotation 11")),
    (changed(put("annotations", 1, segmentation=[])), ("segmentation []", "annotation 11")),
    (changed(put("annotations", 1, segmentation=LEFT)), ("polygon 0", "annotation 11")),
    (changed(polygon()), ("polygon []", "three points", "annotation 14")),
    (changed(polygon(0, 0, 2, 2)), ("three points", "annotation 14")),
    (changed(polygon(*LEFT, 1)), ("three points", "annotation 14")),
    (changed(polygon(*LEFT, "1", 2)), ("three points", "annotation 14")),
    (changed(polygon(*LEFT, FAR, 2)), ("finite", "annotation 14")),
    (changed(polygon(*LEFT, -1e300, 2)), ("finite", "annotation 14")),
    (changed(polygon(*ZIGZAG)), (f"{MAX_OUTLINE} pixels at most", "annotation 14")),
    (changed(runs([20], [5, 4])), ("size [5, 4]", "[4, 5]", "annotation 12")),
    (changed(runs([20], None)), ("size None", "annotation 12")),
    (changed(runs([19])), ("19 pixels", "20", "annotation 12")),
    (changed(runs([0, 21])), ("21 pixels", "annotation 12")),
    (changed(runs([-1, 21])), ("lengths of runs", "annotation 12")),
    (changed(runs([1.5, 18.5])), ("lengths of runs", "annotation 12")),
    (changed(runs([])), ("lengths of runs", "annotation 12")),
    (changed(runs(20)), ("lengths of runs", "annotation 12")),
    (changed(runs("")), ("compressed RLE ''", "annotation 12")),
    (changed(runs("d")), ("compressed RLE 'd'", "annotation 12")),  # ends within a number
    (changed(runs("oooooooooo0")), ("compressed RLE", "annotation 12")),
    (changed(runs("d0\n")), ("compressed RLE", "annotation 12")),
    (changed(runs("é")), ("compressed RLE", "annotation 12")),
    (changed(runs("5")), ("5 pixels", "annotation 12")),
    (changed(runs("O")), ("[-1]", "annotation 12")),
]


@pytest.mark.parametrize(("written", "words"), BAD)
def test_bad_files(tmp_path: Path, written: str | bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(written.encode() if isinstance(written, str) else written)
    with pytest.raises(InputError) as caught:
        build_masks(path, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in (str(path), *words):
        assert word in message
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wsss, file_order, crowd_as_object"):
        build_masks(save(tmp_path / "a.json", small()), tmp_path / "out", "mine")
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            build_masks(path, tmp_path / "out")


def reference(data: Any) -> dict[str, np.ndarray]:
    """The rule wsss in few lines; fails on what it does not know."""
    values = {c: v for v, c in enumerate(sorted(category["id"] for category in data["categories"]), 1)}
    masks = {}
    for image in data["images"]:
        height, width = image["height"], image["width"]
        drawn = []
        for a in (a for a in data["annotations"] if a["image_id"] == image["id"]):
            shape, crowd = a["segmentation"], a.get("iscrowd", 0)
            if isinstance(shape, list):
                region = rle.decode(rle.merge(rle.frPyObjects(shape, height, width)))
            elif isinstance(shape["counts"], str):
                region = rle.decode(shape)
            else:
                counts = shape["counts"]
                region = np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T
            value = 255 if crowd else values[a["category_id"]]
            drawn.append((1 - crowd, -int(region.sum()), a["id"], value, region))
        mask = np.zeros((height, width), np.uint8)
        for *_, value, region in sorted(drawn, key=lambda d: d[:3]):
            mask[region == 1] = value
        masks[f"{os.path.splitext(image['file_name'])[0]}.png"] = mask
    return masks


def mutate(data: Any, draw: random.Random) -> bytes:
    """One change of the text or of one value."""
    if draw.random() < 0.5:
        text = bytearray(json.dumps(data).encode())
        place = draw.randrange(len(text))
        change = draw.choice([b"", b"0", b"9", b"-", b",", b"]", b"}", b'"', b"\\", b"\xff", b"e", b"1" * 30])
        end = len(text) if draw.random() < 0.05 else place + draw.randint(0, 2)
        return bytes(text[:place]) + change + bytes(text[end:])
    data = copy.deepcopy(data)
    inside: Any = data
    while True:
        key = draw.choice(list(inside)) if isinstance(inside, dict) else draw.randrange(len(inside))
        if not (isinstance(inside[key], dict | list) and inside[key]) or draw.random() < 0.05:
            break
        inside = inside[key]
    odd = [
        None,
        True,
        -1,
        0,
        1,
        2,
        3,
        7.5,
        1e300,
        10**9,
        2**70,
        float("nan"),
        "",
        "x",
        "d0",
        [],
        {},
        [[]],
        [LEFT],
        LEFT,
    ]
    if draw.random() < 0.2:
        del inside[key]
    elif draw.random() < 0.2 and isinstance(inside, list):
        inside.insert(key, copy.deepcopy(inside[key]))
    else:
        inside[key] = draw.choice(odd)
    return json.dumps(data).encode()


def test_mutated_files_are_refused_or_drawn_right(tmp_path: Path) -> None:
    data = small()
    data["annotations"].append(region(15, 2, 90, segment(np.eye(4, 5) > 0, compressed=True)))
    draw, refused = random.Random(0), list[str]()
    for i in range(200):
        path, out = tmp_path / "a.json", tmp_path / str(i)
        path.write_bytes(mutate(data, draw))
        try:
            build_masks(path, out)
        except InputError as error:
            refused.append(str(error))
            continue
        expected = reference(json.loads(path.read_bytes()))
        assert {file.name for file in out.iterdir()} == expected.keys()
        assert all(np.array_equal(read_mask(out / name), mask) for name, mask in expected.items())
    assert 20 < len(refused) < 180
    assert all("a.json" in message and "\n" not in message for message in refused)
