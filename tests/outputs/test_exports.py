"""Every export is read back by its tool's own library, pixel by pixel, and what tools export is read by ours."""

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tiny import Ended

from wsss import InputError
from wsss.data.drawn import read_drawn
from wsss.data.folder import Folder
from wsss.data.voc import VOC_CLASSES
from wsss.outputs.coco import write_coco
from wsss.outputs.cvat import write_cvat
from wsss.outputs.label_studio import encode_brush, write_label_studio
from wsss.outputs.png import RESULTS, write_png, write_voc_test
from wsss.outputs.regions import Labelled, has_holes, polygons, runs
from wsss.outputs.yolo import write_yolo
from wsss.writing import palette

Command = Callable[..., Ended]
CLASSES = ["cat", 'big "dog" & <co>', "Füße"]


def masks() -> Iterator[Labelled]:
    """Rings with islands, touching corners, single pixels, thin lines, noise, borders, nothing."""
    rng = np.random.default_rng(0)
    rings = np.zeros((40, 30), np.uint8)
    rings[2:20, 3:25], rings[5:15, 6:20], rings[8:12, 9:14], rings[10, 11] = 1, 0, 2, 1
    rings[25, 0:30], rings[30:40, 29], rings[39, 0] = 3, 1, 2
    yield Labelled("a", "a.jpg", rings)
    checked = (np.indices((9, 11)).sum(0) % 2).astype(np.uint8)
    yield Labelled("sub/b", "sub/b.png", checked)
    yield Labelled("c", "c.jpg", rng.integers(0, 4, (33, 47), np.uint8))
    yield Labelled("d", "d.jpg", np.zeros((8, 5), np.uint8))
    yield Labelled("e", "e.jpg", np.full((1, 7), 2, np.uint8))


def joined(size: tuple[int, int], regions: list[tuple[int, np.ndarray]]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for value, region in regions:
        assert not mask[region.astype(bool)].any()  # no pixel is of two
        mask[region.astype(bool)] = value
    return mask


def finished(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Label Studio exports once somebody has submitted the predictions."""
    return [
        {"id": n, "data": task["data"], "annotations": [{"id": n, "result": task["predictions"][0]["result"]}]}
        for n, task in enumerate(tasks)
    ]


def test_holes_survive_in_polygons() -> None:
    for item in masks():
        for value in np.unique(item.mask):
            region = item.mask == value
            height, width = region.shape
            flat = [polygon.ravel().astype(float).tolist() for polygon in polygons(region)]
            found = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))
            assert np.array_equal(found, region)
    assert [has_holes(item.mask) for item in masks()] == [True, True, True, False, False]


def test_runs_begin_with_false() -> None:
    assert runs(np.array([True, True, False])).tolist() == [0, 2, 1]
    assert runs(np.array([False])).tolist() == [1]


@pytest.mark.parametrize("as_polygons", [False, True])
def test_coco(tmp_path: Path, as_polygons: bool) -> None:
    write_coco(tmp_path / "x.json", masks(), CLASSES, as_polygons)
    read = COCO(tmp_path / "x.json")
    assert [read.cats[c]["name"] for c in (1, 2, 3)] == CLASSES
    for number, item in enumerate(masks(), 1):
        image, annotations = read.imgs[number], read.loadAnns(read.getAnnIds(imgIds=[number]))
        assert (image["file_name"], image["height"], image["width"]) == (item.file, *item.mask.shape)
        found = [(one["category_id"], read.annToMask(one)) for one in annotations]
        assert np.array_equal(joined(item.mask.shape, found), item.mask)
        assert all(one["area"] == region.sum() for one, (_, region) in zip(annotations, found, strict=True))


def test_label_studio_reads_brushes(tmp_path: Path) -> None:
    write_label_studio(tmp_path, masks(), CLASSES)
    config = ElementTree.fromstring((tmp_path / "label_config.xml").read_text(encoding="utf-8"))
    assert [label.get("value") for label in config.iter("Label")] == CLASSES
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk is not installed")
    for task, item in zip(tasks, masks(), strict=True):
        found = [
            (
                1 + CLASSES.index(result["value"]["brushlabels"][0]),
                brush.decode_rle(result["value"]["rle"]).reshape(*item.mask.shape, 4)[..., 3] > 0,
            )
            for result in task["predictions"][0]["result"]
        ]
        assert np.array_equal(joined(item.mask.shape, found), item.mask)


@pytest.mark.parametrize("as_polygons", [False, True])
def test_label_studio_and_back(tmp_path: Path, as_polygons: bool) -> None:
    write_label_studio(tmp_path, masks(), CLASSES, as_polygons)
    corrected = tmp_path / "corrected.json"
    corrected.write_text(json.dumps(finished(json.loads((tmp_path / "tasks.json").read_text()))))
    found = read_drawn(corrected, CLASSES)
    assert list(found) == [item.file for item in masks()]
    for item in masks():
        assert np.array_equal(found[item.file].draw(item.mask.shape), item.mask)


def test_what_label_studio_packs_is_read(tmp_path: Path) -> None:
    """Its own encoder writes single values as literals."""
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk is not installed")
    rng = np.random.default_rng(1)
    layer = rng.integers(0, 3, (12, 17, 4)).astype(np.uint8)
    result = {
        "type": "brushlabels",
        "original_width": 17,
        "original_height": 12,
        "value": {"format": "rle", "rle": brush.encode_rle(layer.ravel()), "brushlabels": ["cat"]},
    }
    (tmp_path / "x.json").write_text(
        json.dumps([{"data": {"image": "/data/upload/1/0123abcd-a.jpg"}, "annotations": [{"result": [result]}]}])
    )
    (drawn,) = read_drawn(tmp_path / "x.json", CLASSES).values()
    assert np.array_equal(drawn.draw((12, 17)), layer[..., 3] > 0)
    region = layer[..., 0] > 0
    assert np.array_equal(brush.decode_rle(encode_brush(region)).reshape(12, 17, 4)[..., 1], 255 * region)


def test_cvat_and_back(tmp_path: Path) -> None:
    write_cvat(tmp_path / "x.xml", masks(), CLASSES)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "x.xml", "annotations.xml")
    for file in ("x.xml", "x.zip"):
        found = read_drawn(tmp_path / file, CLASSES)
        for item in masks():
            assert np.array_equal(found[item.file].draw(item.mask.shape), item.mask)


def test_cvat_by_datumaro(tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro", reason="datumaro is not installed")
    write_cvat(tmp_path / "x.xml", masks(), CLASSES)
    for item in masks():  # without whose images it reads nothing
        path = tmp_path / "images" / item.file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.mask).save(path)
    read = datumaro.Dataset.import_from(str(tmp_path / "x.xml"), "cvat")
    names = [label.name for label in read.categories()[datumaro.AnnotationType.label]]
    found = {item.id: item for item in read}
    for item in masks():
        regions = [(1 + CLASSES.index(names[one.label]), one.image) for one in found[item.name].annotations]
        assert np.array_equal(joined(item.mask.shape, regions), item.mask)
    # and what it writes itself, whose masks begin at the corner of the image
    read.export(str(tmp_path / "theirs"), "cvat", save_media=False)
    (theirs,) = (tmp_path / "theirs").glob("*.xml")
    drawn = {Path(name).with_suffix("").as_posix(): mask for name, mask in read_drawn(theirs, CLASSES).items()}
    for item in masks():
        if item.mask.any():
            assert np.array_equal(drawn[item.name].draw(item.mask.shape), item.mask)


def test_cvat_polygons_and_order(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(
        '<annotations><version>1.1</version><image id="0" name="a.jpg" width="6" height="4">'
        '<polygon label="cat" z_order="1" points="0.00,0.00;3.00,0.00;3.00,2.00;0.00,2.00"/>'
        '<mask label="dog" z_order="0" rle="0, 6" left="2" top="0" width="3" height="2"/><tag label="x"/>'
        "</image></annotations>"
    )
    (mask,) = read_drawn(tmp_path / "x.xml", ["cat", "dog"]).values()
    expected = np.zeros((4, 6), np.uint8)
    expected[:2, 2:5], expected[:2, :3] = 2, 1
    assert np.array_equal(mask.draw((4, 6)), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_segmentation_masks_of_cvat(tmp_path: Path, packed: bool) -> None:
    colours = {"background": (0, 0, 0), CLASSES[0]: (250, 50, 83), CLASSES[1]: (1, 2, 3), "Füße": (9, 9, 9)}
    root = tmp_path / "export"
    rows = ["# label:color_rgb:parts:actions", *(f"{n}:{','.join(map(str, c))}::" for n, c in colours.items())]
    for item in masks():
        path = root / "SegmentationClass" / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(list(colours.values()), np.uint8)[item.mask]).save(path)
    (root / "labelmap.txt").write_text("\n".join(rows), encoding="utf-8")
    if packed:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for path in root.rglob("*"):
                archive.write(path, path.relative_to(root))
    found = read_drawn(tmp_path / "x.zip" if packed else root, CLASSES)
    for item in masks():
        assert np.array_equal(found[item.name].draw(item.mask.shape), item.mask)
    with pytest.raises(InputError, match="one size"):
        found["a"].draw((3, 3))


def test_yolo(tmp_path: Path) -> None:
    items = [item for item in masks() if "/" not in item.name]  # which supervision does not look into
    write_yolo(tmp_path, items, CLASSES)
    assert (tmp_path / "labels/d.txt").read_text() == ""
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    (tmp_path / "images").mkdir()
    for item in items:
        Image.fromarray(np.zeros((*item.mask.shape, 3), np.uint8)).save(tmp_path / "images" / item.file)
    folders = (str(tmp_path / name) for name in ("images", "labels", "data.yaml"))
    read = supervision.DetectionDataset.from_yolo(*folders, force_masks=True)
    assert read.classes == CLASSES
    for path, _, found in read:
        mask = next(item.mask for item in items if item.name == Path(path).stem)
        shown = np.zeros_like(mask)
        for c, region in zip(found.class_id, [] if found.mask is None else found.mask, strict=True):
            shown[region] = c + 1
        assert np.array_equal(shown, mask)


def test_png_says_its_classes(tmp_path: Path) -> None:
    write_png(tmp_path, masks(), CLASSES)
    for item in masks():
        with Image.open(tmp_path / "masks" / f"{item.name}.png") as picture:
            assert picture.mode == "P"
            assert np.array_equal(picture, item.mask)
            assert np.array_equal(picture.convert("RGB"), palette()[item.mask])
    assert (tmp_path / "masks/class_names.txt").read_text(encoding="utf-8").splitlines() == CLASSES
    rows = (tmp_path / "labelmap.txt").read_text(encoding="utf-8").splitlines()
    assert rows[1:3] == ["background:0,0,0::", "cat:128,0,0::"]


def test_archive_for_vocs_server(tmp_path: Path) -> None:
    write_voc_test(tmp_path / "x.tar", masks(), VOC_CLASSES)
    with tarfile.open(tmp_path / "x.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    for item in masks():
        with Image.open(tmp_path / RESULTS / f"{item.name}.png") as picture:
            assert (picture.mode, np.array_equal(picture, item.mask)) == ("P", True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"data": {"image": "a.jpg"}, "annotations": [{"result": []}, {"result": []}]}], "2 annotations"),
        ({"images": []}, "no JSON of Label Studio"),
        ("<annotations><track/></annotations>", "CVAT for images"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><annotations/>', "document type"),
        ('<annotations><image name="a"><box label="cat"/></image></annotations>', "no mask"),
        ('<annotations><image name="a"><mask label="ox"/></image></annotations>', "cannot be read"),
        ("<annotations>" + 2 * '<image name="a" height="2" width="2"/>' + "</annotations>", "each image once"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    (tmp_path / "x").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=said) as error:
        read_drawn(tmp_path / "x", CLASSES)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("rle", [[], [0, 0, 0, 16], encode_brush(np.ones((3, 3), bool))])
def test_a_damaged_brush_is_refused(tmp_path: Path, rle: list[int]) -> None:
    value = {"rle": rle, "brushlabels": ["cat"]}
    result = {"type": "brushlabels", "original_width": 2, "original_height": 2, "value": value}
    task = {"data": {"image": "a.jpg"}, "annotations": [{"result": [result]}]}
    (tmp_path / "x.json").write_text(json.dumps([task]))
    with pytest.raises(InputError, match=r"a\.jpg.*cannot be read"):
        read_drawn(tmp_path / "x.json", CLASSES)["a.jpg"].draw((2, 2))


def test_a_data_set_with_corrected_masks(tmp_path: Path, photographs: Path) -> None:
    """Some images with masks of an export, matched by name: the list of val names them."""
    (photographs / "masks").rename(tmp_path / "masks")
    named = {f"im Urlaub/Bild {n} (groß)": tmp_path / "masks" / f"Bild {n} (groß).png" for n in (1, 2)}
    items = [Labelled(name, f"{name}.JPG", np.array(Image.open(path))) for name, path in named.items()]
    write_label_studio(tmp_path, items, ["cat", "dog"])
    corrected = tmp_path / "corrected.json"
    corrected.write_text(json.dumps(finished(json.loads((tmp_path / "tasks.json").read_text()))))
    (tmp_path / "ten.txt").write_text("\n".join(named), encoding="utf-8")
    plain = Folder(str(photographs), "val", val=str(tmp_path / "ten.txt"), masks=str(tmp_path / "masks"))
    data = Folder(str(photographs), "val", val=str(tmp_path / "ten.txt"), masks=str(corrected), labels="labels.csv")
    assert data.ids == list(named)
    for ours, theirs in zip(data, plain, strict=True):  # type: ignore[call-overload]
        assert np.array_equal(ours["mask"], theirs["mask"])
    assert data.fingerprint != plain.fingerprint
    assert "mask" not in Folder(str(photographs), val=0.5, masks=str(corrected), labels="labels.csv")[0]
    with pytest.raises(InputError, match="6 of 8 images to evaluate on have no mask"):
        Folder(str(photographs), "val", val="all", masks=str(corrected), labels="labels.csv")
