"""What annotation tools export: the shapes of COCO and Label Studio files, and tools that are told by name."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from wsss import InputError
from wsss.data.finding import match
from wsss.data.folder import Folder
from wsss.data.labels import folder_labels, read_labels

COCO: dict[str, Any] = {
    "categories": [
        {"id": 0, "name": "my-animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "my-animals"},
        {"id": 2, "name": "dog", "supercategory": "my-animals"},
    ],
    "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 5, "category_id": 1}, {"image_id": 6, "category_id": 2}],
}


def task(image: str, *results: dict[str, Any], key: str = "image", **data: Any) -> dict[str, Any]:
    return {"data": {key: image, **data}, "annotations": [{"result": list(results)}]}


def choice(*labels: Any, control: str = "animal", kind: str = "choices") -> dict[str, Any]:
    return {"type": kind, "from_name": control, "value": {kind: list(labels)}}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def refused(path: Path, *words: str, **arguments: Any) -> None:
    with pytest.raises(InputError) as caught:
        read_labels(path, **arguments)
    for word in (str(path), *words):
        assert word in str(caught.value)


# COCO


def test_headings_are_no_classes(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path / "a.json", COCO))
    assert labels.classes == ("cat", "dog")
    assert labels.entries == {"a.jpg": (0,), "b.jpg": (1,)}
    (note,) = labels.notes
    assert "the category my-animals is a heading that no annotation uses" in note
    used = COCO | {"annotations": [*COCO["annotations"], {"image_id": 5, "category_id": 0}]}
    assert read_labels(write(tmp_path / "a.json", used)).classes == ("my-animals", "cat", "dog")
    plain = COCO | {"categories": [{"id": n, "name": name} for n, name in enumerate(("_background_", "cat", "dog"))]}
    assert read_labels(write(tmp_path / "a.json", plain)).classes == ("cat", "dog")
    shown = plain | {"annotations": [*COCO["annotations"], {"image_id": 5, "category_id": 0}]}
    refused(write(tmp_path / "a.json", shown), "the class _background_")


def test_a_category_of_its_own_name_stays(tmp_path: Path) -> None:
    """As COCO's person, and one that nothing shows."""
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 2, "name": "car"},
        {"id": 3, "name": "tv"},
    ]
    content = COCO | {"categories": categories}
    assert read_labels(write(tmp_path / "a.json", content)).classes == ("person", "car", "tv")


def test_an_image_listed_twice_has_the_labels_of_both(tmp_path: Path) -> None:
    content = COCO | {"images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "./a.jpg"}]}
    assert read_labels(write(tmp_path / "a.json", content)).entries == {"a.jpg": (0, 1)}


# Label Studio


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("a b%20.jpg", "a b%20.jpg"),
        ("upload/3/ab12cd34-a.jpg", "upload/3/ab12cd34-a.jpg"),
        ("/data/upload/3/ab12cd34-a%20b.jpg?x=1#y", "data/upload/3/ab12cd34-a b.jpg"),
        ("http://localhost:8080/data/local-files/?d=photos/a%26b.jpg", "photos/a&b.jpg"),
        ("/data/local-files/?x=1&d=photos/a.jpg&y=2", "photos/a.jpg"),
        ("/studio/data/local-files/?d=a.jpg", "a.jpg"),
        ("/studio/data/upload/1/ab12cd34-a.jpg", "studio/data/upload/1/ab12cd34-a.jpg"),
        ("s3://bucket/x/a.jpg", "s3://bucket/x/a.jpg"),
        ("https://host/x/a%20b.jpg?sig=%2F", "https://host/x/a b.jpg"),
        ("/tasks/7/resolve/?fileuri=" + base64.b64encode(b"s3://bucket/a.jpg").decode(), "s3://bucket/a.jpg"),
        ("/home/data/a#1.jpg", "home/data/a#1.jpg"),
    ],
)
def test_addresses(tmp_path: Path, address: str, file: str) -> None:
    assert list(read_labels(write(tmp_path / "a.json", [task(address, choice("cat"))])).entries) == [file]


def test_renamed_uploads_find_their_image() -> None:
    name = "data/upload/3/ab12cd34-my_photo_1.jpg"
    for image in ("x/my photo (1).jpg", "x/my photo 1.jpg"):
        assert match([name], [image, "x/other.jpg"]) == {name: image}
    assert match([name], ["x/my photo 1.jpg", "x/my photo (1).jpg"]) == {}


def test_keys_of_images(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    named = task("/data/upload/1/ab12cd34-a.jpg", choice("cat"), key="photo", text="a cat", size=3)
    assert list(read_labels(write(path, [named])).entries) == ["data/upload/1/ab12cd34-a.jpg"]
    refused(write(path, [task("a.jpg", choice("cat"), key="left", right="b.jpg")]), "task 1", "left, right", "2 keys")
    refused(write(path, [task("a cat", choice("cat"), key="text")]), "(text)", "0 keys", "the key image")


def test_controls(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [
        task("a.jpg", choice("cat"), choice("blurred", control="quality")),
        task("b.jpg", choice("dog"), choice("sharp", control="quality")),
    ])  # fmt: skip
    refused(path, "2 controls", "animal (cat, dog)", "quality (blurred, sharp)", "dataset.classes")
    labels = read_labels(path, ["dog", "cat"])
    assert labels.entries == {"a.jpg": (1,), "b.jpg": (0,)}
    assert "the labels of quality are not among dataset.classes" in labels.notes[0]
    tools = [task("a.jpg", choice("cat", kind="brushlabels", control="b")), task("b.jpg", choice("cat", "dog"))]
    assert read_labels(write(path, tools)).classes == ("cat", "dog")  # two tools for the same classes


def test_types_of_results(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [
        task("a.jpg", choice(["animal", "cat"], ["animal", "dog"], kind="taxonomy")),
        task("b.jpg", {"type": "rating", "value": {"rating": 3}}, {"type": "relation"}),
    ])  # fmt: skip
    labels = read_labels(path)
    assert (labels.classes, labels.entries) == (("cat", "dog"), {"a.jpg": (0, 1), "b.jpg": ()})
    assert "1 results of type rating are not read" in labels.notes[0]


def test_tasks_are_joined_and_one_is_enough(tmp_path: Path) -> None:
    twice = [task("a.jpg", choice("cat")), task("a.jpg", choice("dog")), task("a.jpg")]
    assert read_labels(write(tmp_path / "a.json", twice)).entries == {"a.jpg": (0, 1)}
    assert read_labels(write(tmp_path / "a.json", task("a.jpg", choice("cat")))).entries == {"a.jpg": (0,)}


# Other tools


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, ("labelme", "convert")),
        ({"_via_settings": {}, "_via_img_metadata": {}}, ("VIA", "as COCO")),
        ({"a.jpg12": {"filename": "a.jpg", "regions": []}}, ("VIA", "COCO or Label Studio")),
        ([{"image": "a.jpg", "choice": "cat", "annotation_id": 1}], ("JSON-MIN", "export as JSON")),
        ([{"image": "a.jpg", "annotations": [{"label": "cat"}]}], ("CreateML",)),
        ([{"image_id": 1, "category_id": 1, "score": 0.5}], ("results on COCO", "instances file")),
        ({"task": {}, "result": []}, ("single annotation",)),
        ({}, ("neither COCO", "it has nothing")),
    ],
)
def test_tools_are_named(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    refused(write(tmp_path / "a.json", content), *words)


def test_folders_of_tools_are_named(tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"images/{n}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / f"images/{n}.jpg").touch()
        write(tmp_path / f"labelme/{n}.json", {"shapes": [], "imagePath": "a.jpg"})
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(InputError, match="is of YOLO, without names of classes"):
        Folder(str(tmp_path))
    refused(tmp_path / "labels", "is of YOLO", "COCO or VOC XML")
    refused(tmp_path / "labelme", "is of labelme")
    for path in (tmp_path / "labelme").iterdir():
        path.rename(tmp_path / "images" / path.name)
    with pytest.raises(InputError, match=r"holds several labels .* is of labelme"):
        Folder(str(tmp_path / "images"))


# Class folders


def test_folders_of_splits(tmp_path: Path) -> None:
    names = ["Training/cat/1.jpg", "Training/dog/2.jpg", "Testing/cat/x/3.jpg"]
    labels = folder_labels(tmp_path, names)
    assert (labels.classes, list(labels.entries.values())) == (("cat", "dog"), [(0,), (1,), (0,)])
    assert labels.split == dict(zip(names, ("train", "train", "val"), strict=True))
    assert "Testing as val, Training as train" in labels.notes[0]
    labels = folder_labels(tmp_path, [*names, "VALID/dog/4.jpg"])
    assert labels.split["Testing/cat/x/3.jpg"] == "test"
    assert "Testing as a test set, left out" in labels.notes[0]
    for image in [*names, "VALID/dog/4.jpg"]:
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).touch()
    assert [Folder(str(tmp_path), split).ids for split in ("train", "val")] == [
        ["Training/cat/1", "Training/dog/2"],
        ["VALID/dog/4"],
    ]
    assert len(Folder(str(tmp_path), "val", val="all")) == 4
    for images, words in (
        ([*names, "Testing/4.jpg"], "1 images beside its class folders (Testing/4.jpg)"),
        ([*names, "cat/4.jpg"], "Testing does not look like a class"),
        (["0/1.jpg", "1/2.jpg"], "only 0 and 1 as labels"),
        (["cat/1.jpg", "dog/2.jpg", "cat_dog/3.jpg"], "'cat_dog', which reads as several"),
        (["Cat/1.jpg", "cat/2.jpg"], "Cat, cat, which differ in case"),
        (["cat/1.jpg", "background/2.jpg"], "the class background"),
    ):
        with pytest.raises(InputError) as caught:
            folder_labels(tmp_path, images)
        assert words in str(caught.value)
    assert folder_labels(tmp_path, ["0/1.jpg", "1/2.jpg"], ["0", "1"]).classes == ("0", "1")  # the user knows


def test_numbers_are_in_their_order(tmp_path: Path) -> None:
    labels = folder_labels(tmp_path, [f"{n}/{n}.jpg" for n in range(1, 12)])
    assert labels.classes == tuple(map(str, range(1, 12)))
