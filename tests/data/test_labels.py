"""Image-level labels in every format, and what is said about those that cannot be read."""

import csv
import io
import json
import os
import pickle
import random
import re
import struct
import unicodedata
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss import InputError
from wsss.data.files import load_label_dict
from wsss.data.labels import folder_labels, read_labels

DATA = os.environ.get("WSSS_TEST_DATA")
Content = tuple[tuple[str, ...], dict[str, tuple[str, ...]], dict[str, str]]

NOTE = "Photographs of a farm in autumn, taken by three people and labelled by two of them. " * 6
LISTED = 'file,labels,split\nx/1.jpg,cat;dog,train\n2.jpg,,val\n"a, b.png",hot dog,train\nä.jpg,dog,val\n'
TABLE = "file,dog,cat\n1.jpg,1,0\nx/2.jpg,1,1\n3.jpg,0,0\n"
COCO = {
    "info": {"description": NOTE, "year": 2024},
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 5, "name": "cow"}],
    "images": [{"id": n, "file_name": name} for n, name in enumerate(("x/1.jpg", "2.jpg", "ä.jpg"))],
    "annotations": [{"id": n, "image_id": i, "category_id": c, "bbox": [0, 0, 9, 9], "iscrowd": n == 2}
                    for n, (i, c) in enumerate(((0, 7), (0, 3), (2, 3), (0, 7)))],
}  # fmt: skip


def result(kind: str, *labels: str) -> dict[str, Any]:
    return {"id": "a1", "type": kind, "from_name": "label", "to_name": "image", "value": {"x": 1.5, kind: list(labels)}}


def task(image: str, *annotations: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "data": {"image": image, "note": NOTE[:80]},
        "annotations": [{"result": r, **more} for r in annotations],
    }


STUDIO = [
    task("/data/upload/1/abcdef12-1.jpg", [result("choices", "cat", "dog")]),
    task("upload/1/abcdef12-2.jpg", [result("rectanglelabels", "dog"), result("polygonlabels", "cow")]),
    task("/data/local-files/?d=photos%2Fa%20b.jpg", [result("brushlabels", "cat")], [result("choices", "dog")]),
    task("s3://bucket/3.jpg", [{"type": "relation", "from_id": "a", "to_id": "b"}]),
    task("4.jpg", [result("choices", "cat")], was_cancelled=True),
    task("5.jpg"),
]
XML = f"""<?xml version="1.0" encoding="utf-8"?>
<annotation><folder>x</folder><filename>other.jpg</filename><note>{NOTE}</note>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>1</xmin></bndbox><part><name>head</name></part></object><object><name> hot &amp; dog\n</name></object>
</annotation>"""


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str | bytes) else json.dumps(content, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names_of(path: Path, classes: list[str] | None = None) -> Content:
    """What `read_labels` gives, with names in the place of indices."""
    labels = read_labels(path, classes)
    named = {image: tuple(labels.classes[c] for c in present) for image, present in labels.entries.items()}
    return labels.classes, named, dict(labels.split)


def refused(path: Path, *words: str, named: Path | None = None, **arguments: Any) -> None:
    """Asserts that the labels are refused with one sentence that names the file and holds `words`."""
    with pytest.raises(InputError) as caught:
        read_labels(path, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in (str(named or path), *words):
        assert word in message


# CSV


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\n\n").encode(),
        lambda text: unicodedata.normalize("NFD", text).encode(),
        lambda text: text.replace("x/1", ".\\x\\1").encode(),
    ],
    ids=["plain", "bom", "windows", "blank lines", "NFD", "backslash"],
)
def test_listed_labels(tmp_path: Path, encode: Callable[[str], bytes]) -> None:
    classes, entries, split = names_of(write(tmp_path / "labels.csv", encode(LISTED)))
    assert classes == ("cat", "dog", "hot dog")
    assert entries == {"x/1.jpg": ("cat", "dog"), "2.jpg": (), "a, b.png": ("hot dog",), "ä.jpg": ("dog",)}
    assert split == {"x/1.jpg": "train", "2.jpg": "val", "a, b.png": "train", "ä.jpg": "val"}


def test_columns_of_zeros_and_ones(tmp_path: Path) -> None:
    classes, entries, split = names_of(write(tmp_path / "any.txt", TABLE))
    assert classes == ("dog", "cat")
    assert entries == {"1.jpg": ("dog",), "x/2.jpg": ("dog", "cat"), "3.jpg": ()}
    assert split == {}
    text = 'split, cat ,file,"hot  dog"\ntrain, 1 ,a.jpg,0\nval,0,b.jpg,1\n'
    assert names_of(write(tmp_path / "labels.csv", text)) == (
        ("cat", "hot dog"),
        {"a.jpg": ("cat",), "b.jpg": ("hot dog",)},
        {"a.jpg": "train", "b.jpg": "val"},
    )


def test_the_order_of_classes_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", TABLE)
    assert read_labels(path, ["cow", "cat", "dog"]).entries == {"1.jpg": (2,), "x/2.jpg": (1, 2), "3.jpg": ()}
    refused(path, "1 classes (dog)", "2 given", classes=["cat", "cow"])
    for bad in ([], ["cat", "dog", "cat"], ["cat", " "], ["cat", "do\0g"]):
        with pytest.raises(InputError, match="classes"):
            read_labels(path, bad)


def test_a_name_has_one_form(tmp_path: Path) -> None:
    """The same letters composed and decomposed are one class and one file."""
    text = "file,labels\n1.jpg,Ka\u0308se\n2.jpg,K\xe4se; K\xe4se\n"
    assert read_labels(write(tmp_path / "labels.csv", text)).classes == ("K\xe4se",)
    labels = read_labels(write(tmp_path / "labels.csv", "file,labels\na\u0308.jpg,x\n\xe4.jpg,y\n"))
    assert labels.entries == {"\xe4.jpg": (0, 1)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("empty",)),
        ("\n\n", ("empty",)),
        ("file,labels\n", ("labels no image",)),
        ("file,labels\n1.jpg,\n", ("no image", "shows a class")),
        ("file;labels\n1.jpg;cat\n", ("line 1", "';'", "commas")),
        ("file\tcat\n1.jpg\t1\n", ("line 1", "'\\t'", "commas")),
        ('"file";"cat"\n"1.jpg";"1"\n', ("line 1", "quotes and commas")),
        ("image,labels\n1.jpg,cat\n", ("line 1", "image, labels", "file,labels")),
        ("1.jpg,cat\n2.jpg,dog\n", ("line 1", "expected file,labels")),
        ("file\n1.jpg\n", ("line 1", "expected file,labels")),
        ("file,split\n1.jpg,val\n", ("line 1", "add what is missing")),
        ("file,labels,width\n1.jpg,cat,640\n", ("line 1", "width", "remove")),
        ("file,labels,labels\n1.jpg,cat,cat\n", ("line 1", "twice")),
        ("file,cat,cat\n1.jpg,1,1\n", ("line 1", "twice")),
        ("file,,cat\n1.jpg,,1\n", ("line 1", "no name for column 2")),
        (",file,labels\nx,1.jpg,cat\n", ("line 1", "no name for its first column", "no pandas index")),
        ("file,labels,\n1.jpg,cat,dog\n", ("line 2", "3 fields", "semicolons")),
        ("file,labels,split\n1.jpg,cat,val\n1.jpg,dog,train\n", ("line 3", "'train'", "another one further up")),
        ("file,cat,width\n1.jpg,1,640\n", ("line 2", "'640'", "width", "0 or 1")),
        ("file,cat\n1.jpg,1\n2.jpg,\n", ("line 3", "''", "cat", "0 or 1")),
        ("file,cat\n1.jpg,1.0\n", ("line 2", "'1.0'")),
        ("file,labels\n1.jpg,cat\n2.jpg,cat;;dog\n", ("line 3", "empty class name")),
        ("file,labels\n1.jpg,cat;\n", ("line 2", "empty class name")),
        ("file,labels\n1.jpg,cat,dog\n", ("line 2", "3 fields", "expected 2", "semicolons")),
        ("file,labels\n1.jpg\n", ("line 2", "1 fields")),
        ("file,labels\n,cat\n", ("line 2", "no file")),
        ("file,labels\nphotos/,cat\n", ("line 2", "no file")),
        ("file,labels,split\n1.jpg,cat,test\n", ("line 2", "'test'", "train or val")),
        ("file,labels,split\n1.jpg,cat,\n", ("line 2", "''", "train or val")),
        ('file,labels\n"1.jpg,cat\n', ("line 2", "CSV")),
        ('file,labels\n"1.jpg"x,cat\n', ("line 2", "CSV")),
        ("file,labels\n1.jpg," + "x" * 140_000, ("line 2", "field limit")),
        ("file,labels\n1.jpg,c\0at\n", ("line 2", "expected text")),
        ("file,labels\n1.jpg,cat|dog\n", ("'cat|dog'", "semicolons", "dataset.classes")),
        ('file,labels\n1.jpg,"cat, dog"\n', ("'cat, dog'", "semicolons")),
        ("file,labels\n1.jpg,\"['cat', 'dog']\"\n", ("semicolons",)),
        ("file,labels\n1.jpg,cat dog\n2.jpg,cat\n3.jpg,dog\n", ("'cat dog'", "semicolons")),
        ("file,labels\n1.jpg,cat/dog\n2.jpg,cat\n3.jpg,dog\n", ("'cat/dog'", "semicolons")),
        ("file,labels\n1.jpg,cat\n2.jpg,Cat\n", ("Cat, cat", "case or spaces", "dataset.classes")),
        ("file,hot dog,hot_dog\n1.jpg,0,1\n", ("hot dog, hot_dog", "case or spaces")),
        ("file,labels\n1.jpg,0\n2.jpg,1\n", ("only 0 and 1", "called after the class")),
        ("file,labels\n1.jpg,No\n2.jpg,yes\n", ("only No and yes", "called after the class")),
        ("file,labels\n1.jpg,cat\n2.jpg,_background_\n", ("the class _background_", "a row of labels.csv")),
        ("file,labels\n1.jpg,cat\n2.jpg,nan\n", ("the class nan",)),
        ("file,BG,cat\n1.jpg,1,0\n", ("the class BG",)),
        ("file,labels\n1.jpg,Käse\n".encode("cp1252"), ("UTF-8", "0xe4")),
        ("file,labels\n1.jpg,cat\n".encode("utf-16"), ("UTF-8",)),
        (b"PK\x03\x04\xff\xff", ("UTF-8",)),
    ],
)  # fmt: skip
def test_bad_csv(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    refused(write(tmp_path / "labels.csv", content), *words)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.csv", "No such file")


# JSON


def test_coco(tmp_path: Path) -> None:
    for content in (json.dumps(COCO), "\ufeff \r\n" + json.dumps(COCO, indent=1, ensure_ascii=False)):
        classes, entries, split = names_of(write(tmp_path / "instances.json", content))
        assert classes == ("dog", "cat", "cow")
        assert entries == {"x/1.jpg": ("dog", "cat"), "2.jpg": (), "ä.jpg": ("cat",)}
        assert split == {}
    assert read_labels(tmp_path / "instances.json", ["cat", "dog"]).classes == ("cat", "dog")  # nothing shows a cow


def test_label_studio(tmp_path: Path) -> None:
    classes, entries, _ = names_of(write(tmp_path / "project-1.json", STUDIO))
    assert classes == ("cat", "cow", "dog")
    assert entries == {
        "data/upload/1/abcdef12-1.jpg": ("cat", "dog"),
        "upload/1/abcdef12-2.jpg": ("cow", "dog"),
        "photos/a b.jpg": ("cat", "dog"),
        "s3://bucket/3.jpg": (),  # looked at and left empty; 4.jpg and 5.jpg are not finished
    }


def changed(content: Any, *path: Any, value: Any) -> Any:
    """A copy with another value at a place; without it for `...`."""
    copy = json.loads(json.dumps(content))
    node = copy
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copy


BAD_JSON: list[tuple[Any, tuple[str, ...]]] = [
    ("{", ("JSON",)),
    ("[" * 200_000, ("JSON", "recursion")),
    ('{"categories":' * 100_000, ("JSON", "recursion")),
    ("[" + "1" * 5000 + "]", ("JSON", "digits")),
    (b'{"a": "\xff"}', ("JSON",)),
    ({"a": 1}, ("neither COCO (images, annotations and categories) nor Label Studio", "it has a")),
    ({"images": [], "annotations": [], "categories": {}}, ("{} as categories", "expected list")),
    ([], ("labels no image",)),
    ([{"image": "1.jpg", "choice": "cat"}], ("task 1", "data")),
    (changed(COCO, "categories", value=[]), ("categories",)),
    (changed(COCO, "categories", 1, "id", value=7), ("categories[1]", "7 again")),
    (changed(COCO, "categories", 1, "name", value="dog"), ("distinct",)),
    (changed(COCO, "categories", 1, "name", value=" "), ("categories[1]", "empty class name")),
    (changed(COCO, "categories", 1, "name", value=5), ("categories[1]", "5 as name", "expected str")),
    (changed(COCO, "categories", 1, "name", value="c\ud800t"), ("categories[1]", "expected text")),
    (changed(COCO, "images", 1, "file_name", value=...), ("images[1]", "None as file_name")),
    (changed(COCO, "images", 1, "file_name", value="\ud800\n/"), ("images[1]", "no file")),
    (changed(COCO, "images", 1, "id", value=True), ("images[1]", "True as id")),
    (changed(COCO, "images", 1, "id", value=0), ("images[1]", "0 again")),
    (changed(COCO, "annotations", 3, "image_id", value=9), ("annotations[3]", "image 9")),
    (changed(COCO, "annotations", 3, "category_id", value="7"), ("annotations[3]", "category 7")),
    (changed(COCO, "annotations", 3, "category_id", value=[7]), ("annotations[3]", "[7] as category_id")),
    (changed(COCO, "annotations", 3, value=None), ("annotations[3]",)),
    (changed(STUDIO, 0, "data", "image", value=...), ("task 1", "image")),
    (changed(STUDIO, 0, "annotations", value=...), ("task 1", "annotations")),
    (changed(STUDIO, 1, "annotations", 0, value=3), ("task 2", "result")),
    (changed(STUDIO, 1, "annotations", 0, "result", value=None), ("task 2", "result")),
    (changed(STUDIO, 1, "annotations", 0, "result", 0, "type", value=...), ("task 2", "type")),
    (changed(STUDIO, 1, "annotations", 0, "result", 0, "value", value={}), ("task 2", "rectanglelabels")),
    (changed(STUDIO, 0, "annotations", 0, "result", 0, "value", "choices", value=[["cat"]]), ("task 1", "['cat']")),
    (changed(STUDIO, 1, "data", "image", value="/data/local-files/"), ("task 2", "no file")),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    if not isinstance(content, str | bytes):
        content = json.dumps(content)  # escapes the surrogates that UTF-8 has no bytes for
    refused(write(tmp_path / "labels.json", content), *words)


# XML


def test_voc_xml(tmp_path: Path) -> None:
    write(tmp_path / "Annotations/b.xml", XML)
    write(tmp_path / "Annotations/sub/a.jpg.XML", "<annotation/>")
    write(tmp_path / "Annotations/.hidden/c.xml", "no XML")
    expected = (("dog", "hot & dog"), {"b": ("dog", "hot & dog"), "sub/a.jpg": ()}, {})
    assert names_of(tmp_path) == expected
    assert names_of(tmp_path / "Annotations") == expected


BOMB = (
    '<!DOCTYPE annotation [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    "<annotation><object><name>&b;</name></object></annotation>"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("no element",)),
        ("<annotation>", ("no element",)),
        ("<annotation><object></annotation>", ("mismatched",)),
        ("<annotation/><annotation/>", ("junk",)),
        (BOMB, ("document type",)),
        ('<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>', ("document type",)),
        ("<annotation><object><name>&lol;</name></object></annotation>", ("undefined entity",)),
        ("<svg/>", ("<svg>", "expected <annotation>")),
        ("<annotation><object/></annotation>", ("without a name",)),
        ("<annotation><object><name> </name></object></annotation>", ("without a name",)),
        ("<annotation><object><name>&#x9f;</name></object></annotation>", ("expected text",)),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', ("XML",)),
        (b"<annotation>\xff</annotation>", ("invalid token",)),
    ],
)
def test_bad_xml(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    refused(tmp_path, *words, named=write(tmp_path / "1.xml", content))


def test_other_xml_sources(tmp_path: Path) -> None:
    refused(tmp_path, "no XML")
    refused(write(tmp_path / "1.xml", XML), "single XML file", "folder")
    deep = "<annotation>" + "<object>" * 100_000 + "</object>" * 100_000 + "</annotation>"
    refused(tmp_path, "without a name", named=write(tmp_path / "1.xml", deep))


# The field's own file


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "cls_labels.npy"
    np.save(path, {"2007_000032": np.array([1, 0, 1]), "sub/b": np.zeros(3)})  # type: ignore[arg-type]
    refused(path, "class_names.txt", "classes")
    assert names_of(path, ["a", "b", "c"])[:2] == (("a", "b", "c"), {"2007_000032": ("a", "c"), "sub/b": ()})
    refused(path, "vectors of 3", "expected 2", classes=["a", "b"])
    write(tmp_path / "class_names.txt", "x\ny\nz\n")
    assert names_of(path)[:2] == (("x", "y", "z"), {"2007_000032": ("x", "z"), "sub/b": ()})
    assert read_labels(path, ["z", "x"]).entries == {"2007_000032": (0, 1), "sub/b": ()}
    write(tmp_path / "class_names.txt", "x\ny\nx\n")
    refused(path, "distinct", named=tmp_path / "class_names.txt")
    write(tmp_path / "class_names.txt", "x\ny\nz\n")
    path.write_bytes(path.read_bytes()[:-9])
    refused(path, "image-level labels", "np.save")


@pytest.mark.skipif(not DATA, reason="set WSSS_TEST_DATA to the folder of real data")
def test_the_fields_own_file(tmp_path: Path) -> None:
    path = Path(str(DATA), "lists/voc12/cls_labels.npy")
    names = [line.strip() for line in (path.parent / "classes.txt").read_text().splitlines()]
    labels, vectors = read_labels(path, names), load_label_dict(path)
    assert labels.classes == tuple(names)
    assert {name: tuple(v.nonzero()[0].tolist()) for name, v in vectors.items()} == dict(labels.entries)


# Class folders


def test_folders_of_classes(tmp_path: Path) -> None:
    labels = folder_labels(tmp_path, ["dog/1.jpg", "ca\u0308t/a/b.jpg", "c\xe4t/c.jpg"])
    assert labels.classes == ("c\xe4t", "dog")
    assert list(labels.entries.values()) == [(1,), (0,), (0,)]
    for images, words in (
        (["dog/1.jpg", "2.jpg", "3.jpg"], "2 images beside its class folders (2.jpg, 3.jpg)"),
        (["1.jpg"], "neither a label file nor a folder for each class"),
        (["train/1.jpg", "val/2.jpg"], "train does not look like a class"),
    ):
        with pytest.raises(InputError) as caught:
            folder_labels(tmp_path, images)
        assert str(tmp_path) in str(caught.value)
        assert words in str(caught.value)


# Mutated files against a second reader of each format, written on the standard library alone


class UnfitError(Exception):
    """The reference reader does not take the file."""


def want(condition: Any) -> None:
    if not condition:
        raise UnfitError


def plain(name: str) -> str:
    """The form of a class name."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    want(name and not any(unicodedata.category(c) in {"Cc", "Cs"} for c in name))
    return name


def file_form(name: str) -> str:
    form = unicodedata.normalize("NFC", name).replace("\\", "/").lstrip("/")
    form = form[2:] if form[:2] == "./" else form
    want(form.strip() and form[-1] != "/")
    return form


NOTHING = {"background", "bg", "ignore", "nan", "none", "null", "unlabeled", "unlabelled", "void"}


def gather(rows: list[tuple[str, set[str]]], order: list[str] | None = None, split: Any = None) -> Content:
    joined: dict[str, set[str]] = {}
    for name, present in rows:
        joined[name] = joined.get(name, set()) | present
    used = set().union(*joined.values())
    classes = (
        sorted(used, key=lambda c: (int(c), c) if all(c.isdigit() for c in used) else c) if order is None else order
    )
    want(rows and classes and len(set(classes)) == len(classes))
    letters = [
        "".join(letter for letter in c.casefold() if not letter.isspace() and letter not in "_-") for c in classes
    ]
    want(len(set(letters)) == len(letters) and not NOTHING & {c.casefold().strip("_ ") for c in classes})
    return (
        tuple(classes),
        {name: tuple(c for c in classes if c in present) for name, present in joined.items()},
        split or {},
    )


def csv_reference(data: bytes) -> Content:
    table = [
        row
        for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True, skipinitialspace=True)
        if row
    ]
    want(table and not set(table[0][0]) & {";", "\t"})
    while not table[0][-1].strip():
        del table[0][-1]
    table[1:] = [cut(row, len(table[0])) for row in table[1:]]
    if len(table[0]) > 1 and not table[0][0].strip():
        counted = [row[0].strip() for row in table[1:]]
        want(all(cell.isdigit() for cell in counted) and len(set(counted)) == len(counted))
        table = [row[1:] for row in table]
    header = [plain(cell) for cell in table[0]]
    want(len(set(header)) == len(header) and "file" in header)
    classes = [cell for cell in header if cell not in {"file", "labels", "split"}]
    want(("labels" in header) != bool(classes))
    rows, split = [], {}
    for row in table[1:]:
        want(len(row) == len(header))
        name = file_form(row[header.index("file")])
        if classes:
            flags = {c: row[header.index(c)].strip() for c in classes}
            want(set(flags.values()) <= {"0", "1"})
            rows.append((name, {c for c in classes if flags[c] == "1"}))
        else:
            cell = row[header.index("labels")]
            rows.append((name, {plain(part) for part in cell.split(";")} if cell.strip() else set()))
        if "split" in header:
            said = row[header.index("split")].strip()
            want(said in {"train", "val"} and split.get(name, said) == said)
            split[name] = said
    if not classes:
        used = set().union(*(present for _, present in rows)) if rows else set()
        want(not any(set(name) & set("|,[{") for name in used))
        want(
            not any(
                len(p) > 1 and used.issuperset(p)
                for p in ([x for x in re.split(r"[ _/+&:.\\-]", c) if x] for c in used)
            )
        )
        want(used - {"0", "1"} or "0" not in used)
    return gather(rows, classes or None, split)


def cut(row: list[str], width: int) -> list[str]:
    """Without the empty fields beyond a width."""
    return row[:width] if not "".join(row[width:]).strip() else row


def typed(value: Any, *kinds: type) -> Any:
    want(type(value) in kinds)
    return value


def coco_reference(data: bytes) -> Content:
    content = typed(json.loads(data.decode("utf-8-sig")), dict)
    categories, images, annotations = (typed(content[k], list) for k in ("categories", "images", "annotations"))
    names = {typed(c["id"], int, str): plain(typed(c["name"], str)) for c in categories}
    files = {typed(i["id"], int, str): file_form(typed(i["file_name"], str)) for i in images}
    want(len(names) == len(categories) and len(files) == len(images))
    shown: dict[Any, set[str]] = {key: set() for key in files}
    for a in annotations:
        shown[typed(a["image_id"], int, str)].add(names[typed(a["category_id"], int, str)])
    return gather([(files[key], shown[key]) for key in files], list(names.values()))


def studio_reference(data: bytes) -> Content:
    rows, controls = [], {}
    for entry in typed(json.loads(data.decode("utf-8-sig")), list):
        image = typed(entry["data"]["image"], str)
        if image.startswith("/data/local-files/"):
            image = urllib.parse.parse_qs(urllib.parse.urlsplit(image).query).get("d", [""])[0]
        elif image.startswith("/data/") or "://" in image:
            image = urllib.parse.unquote(image.split("?")[0].split("#")[0])
        done = [a for a in typed(entry["annotations"], list) if not (type(a) is dict and a.get("was_cancelled"))]
        present = set()
        for answer in (one for a in done for one in typed(a["result"], list)):
            if typed(answer["type"], str) == "choices" or answer["type"][-6:] == "labels":
                labels = {plain(typed(one, str)) for one in typed(answer["value"][answer["type"]], list)}
                present |= labels
                control = str(answer.get("from_name", ""))
                controls[control] = controls.get(control, set()) | labels
        if done:
            rows.append((file_form(image), present))
    asked = [labels for labels in controls.values() if labels]
    for labels in asked:
        want(len(asked) == 1 or any(labels & others for others in asked if others is not labels))
    return gather(rows)


def xml_reference(data: bytes) -> Content:
    want(b"<!DOCTYPE" not in data)
    tree = ElementTree.fromstring(data)
    want(tree.tag == "annotation")
    present = set()
    for node in tree.findall("object"):
        present.add(plain(node.find("name").text))
    return gather([("1", present), ("2", {"cat"})])


class Loader(pickle._Unpickler):  # type: ignore[name-defined, misc]  # in Python: a hostile length costs no memory
    def find_class(self, module: str, name: str) -> Any:
        want((module.replace("_core", "core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"), ("numpy", "ndarray"),
            ("numpy", "dtype"), ("collections", "OrderedDict"), ("_codecs", "encode"),
        })  # fmt: skip
        return {"dtype": Kind, "OrderedDict": dict, "encode": str.encode}.get(name, Vector)


class Kind:
    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class Vector:
    values: Any

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, kind, _, raw = state
        if kind.code[0] == "O":
            self.values = raw
            return
        letter = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"}.get(kind.code) or {
            "i": "bhiq", "u": "BHIQ"}[kind.code[0]][{1: 0, 2: 1, 4: 2, 8: 3}[int(kind.code[1:])]]  # fmt: skip
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        want(len(shape) == 1 and kind.order in "<>|=")
        order = kind.order if kind.order in "<>" else "<"
        self.values = list(struct.unpack(f"{order}{shape[0]}{letter}", raw))


def npy_reference(data: bytes) -> Content:
    file = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[major]
    shape, _, kind = header(file)
    want(shape == () and kind.hasobject)
    (content,) = Loader(file, encoding="latin1").load().values
    rows = []
    for name, vector in typed(content, dict).items():
        values = vector.values if isinstance(vector, Vector) else vector
        want(len(values) == 3 and all(x in (0, 1) for x in values))
        name = name.decode() if isinstance(name, bytes) else name
        if isinstance(name, int) and len(str(name)) == 10:
            name = f"{str(name)[:4]}_{str(name)[4:]}"
        rows.append((file_form(typed(name, str)), {c for c, x in zip("abc", values, strict=True) if x}))
    return gather(rows, list("abc"))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flips, deletes, inserts or repeats a few bytes, or cuts the end off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        place, run = rng.randrange(len(changed) or 1), rng.choice((1, 1, 1, 2, 8))
        match rng.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[place : place + 1] = bytes([changed[place] ^ 1 << rng.randrange(8)]) if changed else b""
            case 2:
                del changed[place : place + run]
            case 3:
                changed[place:place] = bytes(rng.choice(b',;"\n\r 01{}[]<>&/a\0\xc3') for _ in range(run))
            case 4:
                changed[place : place + 1] = bytes([rng.choice(b"abco01 ")])
            case 5 if rng.random() < 0.3:
                del changed[place:]
            case 5:
                changed[place:place] = changed[place : place + 20]
    return bytes(changed)


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    labels: Any = {"2007_000032": np.array([1, 0, 1], np.float32), NOTE[:200]: np.zeros(3, np.float32)}
    np.save(buffer, labels)
    return buffer.getvalue()


FORMATS: dict[str, tuple[str, Callable[[], bytes], Callable[[bytes], Content]]] = {
    "csv, labels": ("labels.csv", LISTED.encode, csv_reference),
    "csv, 0/1": ("labels.csv", TABLE.encode, csv_reference),
    "coco": ("labels.json", json.dumps(COCO, indent=1).encode, coco_reference),
    "label studio": ("labels.json", json.dumps(STUDIO, indent=1).encode, studio_reference),
    "voc xml": ("1.xml", XML.encode, xml_reference),
    "npy": ("cls_labels.npy", npy_bytes, npy_reference),
}
ROUNDS = 170  # of six formats: more than a thousand files


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # of numpy, on headers that it finds odd
def test_mutated_labels_are_refused_or_read_as_a_second_reader_does(tmp_path: Path) -> None:
    table: dict[str, Counter[str]] = {}
    for number, (kind, (file, original, reference)) in enumerate(FORMATS.items()):
        folder, rng, outcomes = tmp_path / str(number), random.Random(number), Counter[str]()
        table[kind] = outcomes
        write(folder / "class_names.txt", "a\nb\nc\n")
        source = folder if kind == "voc xml" else folder / file
        if kind == "voc xml":
            write(folder / "2.xml", "<annotation><object><name>cat</name></object></annotation>")
        for turn in range(ROUNDS + 1):
            data = mutate(original(), rng) if turn else original()
            write(folder / file, data)
            try:
                theirs: Content | None = reference(data)
            except Exception:  # the standard library raises nearly everything, and so may looking at what it gives
                theirs = None
            ours, message = None, ""
            try:
                ours = names_of(source)
            except InputError as error:
                message = str(error)
            if ours is None:
                assert turn, f"{kind} is refused as it is: {message}"
                assert len(message.splitlines()) == 1
                assert str(source) in message
                outcomes["refused by both" if theirs is None else "refused by ours alone"] += 1
            else:
                assert ours == theirs, f"{kind}: {data!r}"
                outcomes["read alike"] += bool(turn)
    columns = ("read alike", "refused by both", "refused by ours alone")
    print(f"\n{'mutated files':14}" + "".join(f"{column:>24}" for column in columns))
    for kind, outcomes in table.items():
        print(f"{kind:14}" + "".join(f"{outcomes[column]:24}" for column in columns))
        assert outcomes["read alike"] > 10
        if kind != "npy":  # numpy's own header and pickle's frames are held more strictly than the reference does
            assert outcomes["refused by ours alone"] == 0
    assert sum(sum(outcomes.values()) for outcomes in table.values()) >= 1000
