"""Instances JSON that cannot be used: one sentence, or the right masks, never a traceback."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instances import LEFT, region, save, segment, small
from pycocotools import mask as rle

from wsss import InputError
from wsss.data.files import read_mask
from wsss.data.instances import MAX_OUTLINE, MAX_PIXELS, build_masks


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
