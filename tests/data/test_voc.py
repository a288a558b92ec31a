import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import wsss.data.base
import wsss.data.files
import wsss.data.voc
from wsss import InputError
from wsss.data.files import load_label_dict, read_annotation
from wsss.data.voc import VOC, VOC_CLASSES

DATA = os.environ.get("WSSS_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="set WSSS_TEST_DATA to the folder of real data")
IDS = ("2007_000032", "2007_000039", "2007_000063")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images to train on, one to evaluate on, classes cat and dog."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for image_id in IDS:
        Image.new("RGB", (5, 4), (9, 9, 9)).save(root / "JPEGImages" / f"{image_id}.jpg")
        mask = np.array([[0, 1, 2, 255, 0]] * 4, np.uint8)
        Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{image_id}.png")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(IDS[:2]))
    (root / "ImageSets/Segmentation/val.txt").write_text(IDS[2])
    (root / "class_names.txt").write_text("cat\nhot dog\n")
    np.save(root / "cls_labels_onehot.npy", {i: np.array([1, n % 2], np.float32) for n, i in enumerate(IDS)})
    return root


def refused(*words: str, **arguments: Any) -> None:
    with pytest.raises(InputError) as caught:
        VOC(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_training_items_have_no_mask(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsss.data.base, "read_truth", None)
    data = VOC(str(root))
    assert data.classes == ("cat", "hot dog")
    assert data.ids == list(IDS[:2])
    assert len(data) == 2
    item = data[1]
    assert set(item) == {"image", "label", "id"}
    assert item["id"] == IDS[1]
    assert item["image"].shape == (4, 5, 3)
    assert item["image"].dtype == np.uint8
    assert item["label"].dtype == np.float32
    assert item["label"].tolist() == [1, 1]
    item["label"][:] = 0
    assert data[1]["label"].tolist() == [1, 1]


def test_training_needs_no_masks(root: Path) -> None:
    (root / "SegmentationClassAug").rename(root / "elsewhere")
    assert VOC(str(root)).masks is None
    refused("SegmentationClass", root=str(root), split="val")
    assert len(VOC(str(root), "val", masks="elsewhere")) == 1
    (root / "elsewhere").rename(root / "SegmentationClass")
    assert len(VOC(str(root), "val")) == 1


def test_evaluation_items_have_a_mask(root: Path) -> None:
    item = VOC(str(root), "val")[0]
    assert item["id"] == IDS[2]
    assert item["mask"].dtype == np.uint8
    assert item["mask"][0].tolist() == [0, 1, 2, 255, 0]


def test_lists_labels_and_masks_from_elsewhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (root / "cls_labels_onehot.npy").rename(tmp_path / "my.npy")
    (root / "SegmentationClassAug").rename(tmp_path / "my_masks")
    (tmp_path / "my.txt").write_text(IDS[0])
    arguments = {"val": "my.txt", "labels": "my.npy", "masks": "my_masks"}
    assert VOC("voc", "val", **arguments).ids == [IDS[0]]
    assert VOC("voc", "val", **{k: str(tmp_path / v) for k, v in arguments.items()})[0]["mask"].max() == 255
    assert VOC("voc", train="ImageSets/Segmentation/val.txt", labels="my.npy").ids == [IDS[2]]


def test_any_suffix_and_list_style(root: Path) -> None:
    (root / "JPEGImages" / f"{IDS[0]}.jpg").rename(root / "JPEGImages" / f"{IDS[0]}.JPEG")
    Image.new("RGB", (5, 4)).save(root / "JPEGImages" / f"{IDS[1]}.png")
    lines = "".join(f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in IDS[:2])
    (root / "ImageSets/Segmentation/train_aug.txt").write_text(lines)
    data = VOC(str(root))
    assert [item["id"] for item in (data[0], data[1])] == list(IDS[:2])
    assert data[1]["image"].max() == 9  # of .png and .jpg the latter


def test_initialisation_opens_no_image(root: Path) -> None:
    (root / "JPEGImages" / f"{IDS[0]}.jpg").write_bytes(b"")
    data = VOC(str(root))
    with pytest.raises(InputError, match=IDS[0]):
        data[0]


def test_bad_arguments(root: Path) -> None:
    good = str(root)
    refused("'test'", root=good, split="test")
    refused("JPEGImages", "cls_labels", "none/", root=f"{good}/none/")
    refused("missing.txt", "train_aug, val", root=good, train="missing")
    refused("missing.txt", root=good, train="missing.txt")
    refused("missing.npy", root=good, labels="missing.npy")
    refused("missing", root=good, split="val", masks="missing")
    refused("2 classes, expected 1", root=good, classes=["cat"])
    refused("distinct", root=good, classes=["cat", "cat"])
    (root / "class_names.txt").unlink()
    refused("2 classes, expected 20", "class_names.txt", root=good)
    (root / "class_names.txt").write_text("")
    refused("class_names.txt", root=good)


def test_missing_files_and_labels_are_counted_and_named(root: Path) -> None:
    good = str(root)
    (root / "SegmentationClassAug" / f"{IDS[2]}.png").unlink()
    refused("1 of 1", IDS[2], "mask", root=good, split="val")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join([IDS[0], "a", "b", "c", "d"]))
    refused("4 of 5", "(a, b, c, ...)", "image", root=good)
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(IDS))
    np.save(root / "cls_labels_onehot.npy", {IDS[0]: np.ones(2, np.float32)})
    refused("2 of 3", f"({IDS[1]}, {IDS[2]})", "label", "cls_labels_onehot.npy", root=good)
    np.save(root / "cls_labels.npy", {IDS[0]: np.ones(2, np.float32)})
    refused("cls_labels.npy, cls_labels_onehot.npy", "labels=", root=good)
    for path in root.glob("*.npy"):
        path.unlink()
    refused("found none", "labels=", root=good)


def test_masks_that_do_not_fit(root: Path) -> None:
    data = VOC(str(root), "val")
    path = root / "SegmentationClassAug" / f"{IDS[2]}.png"
    for mask, words in (
        (np.zeros((5, 4), np.uint8), ("(5, 4)", "(4, 5)")),
        (np.array([[0, 3, 254, 255, 3]] * 4, np.uint8), ("[3, 254]", "0 to 2")),
    ):
        Image.fromarray(mask).save(path)
        with pytest.raises(InputError) as caught:
            data[0]
        assert all(word in str(caught.value) for word in (path.name, *words))


@real
@pytest.mark.parametrize(("name", "train", "val", "classes"), [("voc12_mix", 84, 15, 20), ("msrc_v2", 293, 199, 15)])
def test_real_data(name: str, train: int, val: int, classes: int) -> None:
    root = str(Path(str(DATA), name))
    for split, count in (("train", train), ("val", val)):
        data = VOC(root, split, train="train")
        assert len(data) == count
        assert len(data.classes) == classes
        for item in (data[i] for i in range(min(count, 100))):
            assert item["image"].ndim == 3
            assert item["label"].shape == (classes,)
            assert ("mask" in item) == (split == "val")


@real
def test_the_names_of_voc() -> None:
    assert wsss.data.files.read_lines(Path(str(DATA), "lists/voc12/classes.txt")) == list(VOC_CLASSES)


def test_train_takes_the_place_of_train_aug(root: Path) -> None:
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text(IDS[0])
    assert VOC(str(root)).ids == list(IDS[:2])
    (lists / "train_aug.txt").unlink()
    assert VOC(str(root)).ids == [IDS[0]]
    (lists / "train.txt").unlink()
    refused("train.txt", "val", root=str(root))


def test_labels_with_numbers_as_keys(root: Path) -> None:
    labels = VOC(str(root)).labels
    path = root / "cls_labels_onehot.npy"
    numbers = {np.int32(key.replace("_", "")): vector for key, vector in load_label_dict(path).items()}
    np.save(path, numbers)
    assert np.array_equal(VOC(str(root)).labels, labels)


# XML


def annotate(root: Path, name: str, objects: str, folder: str = "Annotations") -> Path:
    (root / folder).mkdir(exist_ok=True)
    path = root / folder / f"{name}.xml"
    path.write_text(f"<annotation>\n<filename>{name}.jpg</filename>{objects}</annotation>\n")
    return path


def thing(name: str, inner: str = "") -> str:
    return f"<object>\n\t<name>{name}</name>{inner}<bndbox><xmin>1</xmin></bndbox></object>"


def test_objects_of_an_annotation(tmp_path: Path) -> None:
    part = "<difficult>1</difficult><part><name>head</name></part>"
    path = annotate(tmp_path, "a", thing("person", part) + thing(" hot dog\n") + thing("person"))
    assert read_annotation(path) == ("person", "hot dog")
    assert read_annotation(annotate(tmp_path, "a", "")) == ()
    path.write_bytes('<?xml version="1.0" encoding="latin1"?>\n<annotation/>'.encode("latin1"))
    assert read_annotation(str(path)) == ()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "no element found"),
        ("aeroplane", "syntax error"),
        ("<annotation><object>", "no element found"),
        ("<annotation></annotation><annotation/>", "junk"),
        ("<html><object><name>cat</name></object></html>", "<html>"),
        ("<annotation><object><nome>cat</nome></object></annotation>", "without a name"),
        ("<annotation><object><name> </name></object></annotation>", "without a name"),
        ("<annotation><object><name>&cat;</name></object></annotation>", "undefined entity"),
        ("<!DOCTYPE annotation><annotation/>", "document type"),
        ('<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]><annotation>&z;</annotation>', "document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><annotation/>', "document type"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>', "document type"),
    ],
)
def test_other_xml_is_refused(tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_annotation(path)
    assert all(part in str(caught.value) for part in (str(path), word))
    assert "\n" not in str(caught.value)


def test_missing_annotation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_annotation(tmp_path / "a.xml")


def test_labels_from_annotations(root: Path) -> None:
    for name, objects in zip(IDS, (thing("hot dog"), thing("cat") * 2 + thing("hot dog"), thing("cat")), strict=True):
        annotate(root, name, objects)
        annotate(root, name, thing("cat"), "boxes")
    annotate(root, "not listed", thing("unicorn"))
    assert VOC(str(root)).labels.tolist() == [[1, 0], [1, 1]]  # the .npy comes first
    assert VOC(str(root), labels="Annotations").labels.tolist() == [[0, 1], [1, 1]]
    assert VOC(str(root), labels=str(root / "boxes")).labels.tolist() == [[1, 0], [1, 0]]
    (root / "cls_labels_onehot.npy").unlink()
    data = VOC(str(root))
    assert data.labels.dtype == np.float32
    assert data.labels.tolist() == [[0, 1], [1, 1]]
    assert VOC(str(root), "val").labels.tolist() == [[1, 0]]
    annotate(root, IDS[0], "")
    assert VOC(str(root)).labels.tolist() == [[0, 0], [1, 1]]


def test_annotations_that_do_not_fit(root: Path) -> None:
    good = {"root": str(root), "labels": "Annotations"}
    annotate(root, IDS[0], thing("cat"))
    refused("1 of 2", IDS[1], "label in", "Annotations", **good)
    path = annotate(root, IDS[1], thing("cat") + thing("Dog"))
    refused(str(path), "'Dog'", "cat, hot dog", **good)
    path.write_text("<annotation>")
    refused(str(path), "XML", **good)
    refused("no folder", "nowhere", **(good | {"root": str(root / "nowhere")}))


# The test list


def test_test_images_have_no_masks(root: Path) -> None:
    (root / "ImageSets/Segmentation/val.txt").rename(root / "ImageSets/Segmentation/test.txt")
    (root / "SegmentationClassAug" / f"{IDS[2]}.png").unlink()
    data = VOC(str(root), "val", val="test")
    assert data.masks is None
    assert set(data[0]) == {"image", "label", "id"}
    elsewhere = root / "test.txt"
    elsewhere.write_text(IDS[2])
    assert VOC(str(root), "val", val=str(elsewhere)).masks is None
    assert VOC(str(root), "val", val="test", masks="SegmentationClassAug").masks is None
    refused("nowhere", root=str(root), split="val", val="test", masks="nowhere")
    elsewhere.write_text("\n".join(IDS))
    refused("1 of 3", IDS[2], "mask", root=str(root), split="val", val="test.txt")  # some have one
    elsewhere.rename(root / "val2.txt")
    (root / "val2.txt").write_text(IDS[2])
    refused("1 of 1", "mask", root=str(root), split="val", val="val2.txt")  # not named test
    (root / "SegmentationClassAug").rename(root / "masks")
    assert VOC(str(root), "val", val="test").masks is None
    (root / "masks" / f"{IDS[0]}.png").rename(root / "masks" / f"{IDS[2]}.png")
    assert VOC(str(root), "val", val="test", masks="masks")[0]["mask"].shape == (4, 5)


def test_test_images_have_no_labels(root: Path) -> None:
    lists = root / "ImageSets/Segmentation"
    (lists / "test.txt").write_text("\n".join(IDS[1:]))
    np.save(root / "cls_labels_onehot.npy", {IDS[0]: np.ones(2, np.float32)})
    words = ("none of the 2 images", "test.txt", "no public labels", "wsss-predict")
    refused(*words, root=str(root), split="val", val="test")
    (root / "Annotations").mkdir()
    refused(*words, root=str(root), split="val", val="test", labels="Annotations")
    refused("2 of 2", "label", root=str(root), train="test")  # to train on it is another matter
    np.save(root / "cls_labels_onehot.npy", {IDS[1]: np.ones(2, np.float32)})
    refused("1 of 2", IDS[2], "label", root=str(root), split="val", val="test")


@real
@pytest.mark.parametrize("source", ["root's own", "the field's", "numbers as keys"])
@pytest.mark.parametrize(
    ("name", "train", "counts"),
    [("voc12_mix", "train", (84, 15)), ("voc12_mix", "all", (99, 15)), ("voc12_animals_256", None, (3131, 445))],
)
def test_real_data_with_every_source_of_labels(
    tmp_path: Path, name: str, train: str | None, counts: tuple[int, int], source: str
) -> None:
    root, labels = str(Path(str(DATA), name)), None
    if source != "root's own":
        labels = str(Path(str(DATA), "lists/voc12/cls_labels.npy"))
    if source == "numbers as keys":
        numbers = {np.int32(key.replace("_", "")): vector for key, vector in load_label_dict(str(labels)).items()}
        labels = str(tmp_path / "labels.npy")
        np.save(labels, numbers)
    for split, count in zip(("train", "val"), counts, strict=True):
        data, own = (VOC(root, split, train=train, labels=given) for given in (labels, None))
        assert len(data) == count
        assert np.array_equal(data.labels, own.labels)
        assert data.labels.any(1).all()
        for index in range(0, count, max(count // 20, 1)):
            assert ("mask" in data[index]) == (split == "val")
