import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import Server, make_tar
from voc2012 import EXTRA, IDS, SIZE, TRAIN, VAL, ids_of, png, sbd_files, tree, voc_files, write, xml

from wsss import InputError
from wsss.data.files import load_label_dict, read_list, read_mask
from wsss.data.voc import VOC, VOC_CLASSES
from wsss.prepare import download
from wsss.prepare.voc import FIELD, GENUINE, TrainAug, derive_train_aug, prepare_voc
from wsss.writing import palette

DATA = os.environ.get("WSSS_TEST_DATA")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write(tmp_path / "VOC2012", voc_files())


@pytest.fixture
def sbd(tmp_path: Path) -> Path:
    return write(tmp_path / "dataset", sbd_files())


def refused(call: Callable[..., Any], *args: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# train_aug


def test_train_aug(voc: Path, sbd: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    report = derive_train_aug(voc, sbd, lambda *call: calls.append(call))
    text = (voc / "ImageSets/Segmentation/train_aug.txt").read_bytes()
    assert text.decode() == "2007_000032\n2007_000039\n2008_000002\n2008_000007\n"
    assert (report.ids, report.sha256) == (4, hashlib.sha256(text).hexdigest())
    assert (report.voc_masks, report.sbd_masks, report.written, report.missing_images) == (4, 2, 6, 0)
    assert report.notes == ()
    assert calls == [(n + 1, 6) for n in range(6)]
    assert sorted(os.listdir(voc / "SegmentationClassAug")) == [f"{name}.png" for name in IDS]
    for name in IDS:
        path = voc / "SegmentationClassAug" / f"{name}.png"
        assert np.array_equal(read_mask(path), ids_of(name, 1 if name in EXTRA else 0))
        with Image.open(path) as image:
            assert image.mode == "P"
            assert bytes(image.getpalette() or ()) == palette().tobytes()


def test_what_is_equal_is_not_written_again(voc: Path, sbd: Path) -> None:
    first = derive_train_aug(voc, sbd)
    made = tree(voc)
    kept, changed, broken = (voc / "SegmentationClassAug" / f"{name}.png" for name in IDS[:3])
    kept.write_bytes(png(ids_of(IDS[0], 0), "L"))  # equal ids in another file
    content = kept.read_bytes()
    changed.write_bytes(png(ids_of(IDS[1], 3)))
    broken.write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in voc.rglob("*")}
    again = derive_train_aug(voc, sbd)
    assert (again.written, first.written) == (2, 6)
    assert kept.read_bytes() == content
    assert {p for p in times if p.is_file() and p.stat().st_mtime_ns != times[p]} == {changed, broken}
    kept.unlink()
    assert derive_train_aug(voc, sbd).written == 1
    assert tree(voc) == made


def test_missing_images_are_counted(voc: Path, sbd: Path) -> None:
    (voc / "JPEGImages/2008_000002.jpg").unlink()
    report = derive_train_aug(voc, sbd)
    assert report.missing_images == 1
    assert "1 images" in report.notes[0]


def report_on(lists: dict[str, list[str]], root: Path, monkeypatch: pytest.MonkeyPatch) -> TrainAug:
    """The report on lists alone: with a mask wherever VOC or SBD has one, and no photograph."""
    files = {f"ImageSets/Segmentation/{name}.txt": lists[name] for name in ("train", "val")}
    files |= {"sbd/train.txt": lists["sbd_train"], "sbd/val.txt": lists["sbd_val"]}
    write(root, {name: "\n".join(ids).encode() for name, ids in files.items()})
    stems = {"SegmentationClass": lists["train"] + lists["val"], "cls": lists["sbd_train"] + lists["sbd_val"]}
    monkeypatch.setattr(
        "wsss.prepare.voc.files_by_stem", lambda path, *_: dict.fromkeys(stems.get(path.name, []), path)
    )
    monkeypatch.setattr("wsss.prepare.voc.read_mask", lambda _: None)
    monkeypatch.setattr("wsss.prepare.voc.read_segmentation", lambda _: None)
    monkeypatch.setattr("wsss.prepare.voc._write_mask_if_changed", lambda *_: True)
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    return derive_train_aug(root, root / "sbd")


def test_unlike_the_released_sbd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's own numbers of images with an SBD that is not the released one: said, not refused."""
    ids = [f"2007_{n:06d}" for n in range(4000)]
    lists = {"train": ids[: GENUINE[0]], "val": ids[-GENUINE[1] :], "sbd_train": ids[1000:1500], "sbd_val": ids[-2:]}
    report = report_on(lists, tmp_path, monkeypatch)
    assert (report.ids, report.missing_images, len(report.notes)) == (1500, 1500, 2)
    assert "1500" in report.notes[0]
    assert "10582" in report.notes[0]


@pytest.mark.skipif(not DATA, reason="set WSSS_TEST_DATA to the folder of real data")
def test_the_fields_own_list_has_the_known_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's lists and an SBD of the field's train_aug and half of val."""
    train, val, train_aug = (read_list(Path(str(DATA), f"lists/voc12/{n}.txt")) for n in ("train", "val", "train_aug"))
    lists = {"train": train, "val": val, "sbd_train": train_aug[:5000] + val[::2], "sbd_val": train_aug[5000:]}
    report = report_on(lists, tmp_path, monkeypatch)
    assert (report.ids, report.sha256[:12]) == FIELD == (10_582, "d1326bd53264")
    assert (report.voc_masks, report.sbd_masks, report.written) == (2913, 9118, 12_031)
    assert len(report.notes) == 1  # no photographs here


def test_broken_inputs_are_refused(voc: Path, sbd: Path) -> None:
    (sbd / "cls/2008_000002.mat").unlink()
    refused(derive_train_aug, voc, sbd, words=("1 of 6", "2008_000002", str(sbd)))
    (sbd / "cls/2008_000002.mat").write_bytes(b"broken")
    refused(derive_train_aug, voc, sbd, words=("2008_000002.mat", "cannot be read"))
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists()
    shutil.rmtree(sbd / "cls")
    refused(derive_train_aug, voc, sbd, words=(str(sbd / "cls"), "SBD"))
    (sbd / "val.txt").unlink()
    refused(derive_train_aug, voc, sbd, words=(str(sbd / "val.txt"),))


# From nothing


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
    """VOC's tar and SBD's tgz on servers that drop every connection."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "CHUNK", 1500)
    (tmp_path / "served").mkdir()
    given = [
        make_tar(tmp_path / "served/voc.tar", {f"VOCdevkit/VOC2012/{k}": v for k, v in voc_files().items()}),
        make_tar(
            tmp_path / "served/sbd.tgz",
            {f"benchmark_RELEASE/dataset/{k}": v for k, v in sbd_files().items()} | {"benchmark_RELEASE/README": b"x"},
            "w:gz",
        ),
    ]
    servers = Server(), Server()
    for server, path in zip(servers, given, strict=True):
        server.content, server.drop = path.read_bytes(), path.stat().st_size // 3
    yield servers
    for server in servers:
        server.close()


def arguments(servers: tuple[Server, Server]) -> dict[str, Any]:
    urls = [server.url.replace("a.bin", name) for server, name in zip(servers, ("voc.tar", "sbd.tgz"), strict=True)]
    sums = [hashlib.md5(server.content).hexdigest() for server in servers]
    return {"voc_url": urls[0], "sbd_url": urls[1], "voc_md5": sums[0], "sbd_md5": sums[1]}


def check(root: Path) -> None:
    train, val = VOC(str(root)), VOC(str(root), "val")
    assert train.ids == sorted({*TRAIN, *EXTRA})
    assert val.ids == list(VAL)
    assert [train[i]["image"].shape[:2] for i in range(4)] == [SIZE] * 4
    for item in (val[0], val[1]):
        assert np.array_equal(item["mask"], ids_of(item["id"], 0))
    labels = load_label_dict(root / "cls_labels.npy")
    assert sorted(labels) == IDS
    for n, name in enumerate(IDS):
        assert {VOC_CLASSES[c] for c in np.flatnonzero(labels[name])} == {"cat", VOC_CLASSES[n]}
        assert labels[name].dtype == np.float32


def test_everything_from_nothing(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    root, steps = tmp_path / "root", {}
    given = arguments(servers)
    report = prepare_voc(root, **given, progress=lambda what, *done: steps.update({what: done}))
    check(root)
    assert report.train_aug.ids == 4
    assert (report.labels, report.labelled) == (root / "cls_labels.npy", 6)
    assert list(steps) == [
        "downloading voc.tar", "unpacking voc.tar", "downloading sbd.tgz", "unpacking sbd.tgz",
        "SegmentationClassAug", "image-level labels",
    ]  # fmt: skip
    assert all(done == total for what, (done, total) in steps.items() if "unpack" not in what)
    assert sorted(os.listdir(root)) == [
        "Annotations", "ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug", "VOCdevkit",
        "benchmark_RELEASE", "cls_labels.npy", "downloads",
    ]  # fmt: skip
    assert sorted(os.listdir(root / "downloads")) == ["sbd.tgz", "voc.tar"]
    made, requests = tree(root), [len(server.seen) for server in servers]
    assert min(requests) >= 3
    shutil.rmtree(root / "benchmark_RELEASE")
    shutil.rmtree(root / "downloads")
    again = prepare_voc(str(root), **given)  # is finished: needs neither SBD nor the network
    assert again.train_aug.written == 0
    assert (again.train_aug.ids, again.train_aug.voc_masks, again.labelled) == (4, 4, 6)
    assert tree(root).items() <= made.items()
    assert [len(server.seen) for server in servers] == requests


def test_interrupted_at_every_step(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    """Killed after each further call of the progress callback, then run again: the same tree."""
    given = arguments(servers)
    prepare_voc(tmp_path / "whole", **given)
    root, kills, done = tmp_path / "killed", 0, False
    while not done:
        seen: list[tuple[str, int]] = []

        def progress(what: str, count: int, _: int | None, seen: list[tuple[str, int]] = seen) -> None:
            seen.append((what, count))
            if len(seen) == 2:
                raise KeyboardInterrupt

        try:
            prepare_voc(root, **given, progress=progress if kills < 12 else None)
            done = True
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 5
    check(root)
    assert tree(root) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "what", ["downloading voc", "unpacking voc", "downloading sbd", "unpacking sbd", "Seg", "image"]
)
def test_killed_once_in_each_step(tmp_path: Path, servers: tuple[Server, Server], what: str) -> None:
    given = arguments(servers)
    prepare_voc(tmp_path / "whole", **given)

    def progress(step: str, count: int, total: int | None) -> None:
        if step.startswith(what) and total and count >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_voc(tmp_path / "killed", **given, progress=progress)
    prepare_voc(tmp_path / "killed", **given)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_what_is_there_is_taken(tmp_path: Path) -> None:
    """A tree that is VOC2012 itself, with SBD beside it, and labels of its own: no network, no link."""
    root = write(tmp_path / "root", voc_files())
    write(root / "dataset", sbd_files())
    np.save(root / "cls_labels_onehot.npy", {name: np.ones(20, np.float32) for name in IDS})
    report = prepare_voc(root, "file:///none", "file:///none")
    assert report.labels.name == "cls_labels_onehot.npy"
    assert VOC(str(root)).labels.all()
    assert not (root / "cls_labels.npy").exists()
    assert not (root / "downloads").exists()
    assert not any(path.is_symlink() for path in root.iterdir())


def test_a_devkit_is_linked_and_not_written_to(tmp_path: Path) -> None:
    kit = write(tmp_path / "elsewhere/VOC2012", voc_files())
    before = tree(kit)
    (tmp_path / "root/VOCdevkit").mkdir(parents=True)
    (tmp_path / "root/VOCdevkit/VOC2012").symlink_to(kit)
    write(tmp_path / "root/benchmark_RELEASE/dataset", sbd_files())
    prepare_voc(tmp_path / "root", "file:///none", "file:///none")
    check(tmp_path / "root")
    assert tree(kit) == before
    (tmp_path / "root").rename(tmp_path / "moved")
    check(tmp_path / "moved")


def test_archives_by_hand(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    given = arguments(servers)
    (tmp_path / "root/downloads").mkdir(parents=True)
    for name in ("voc.tar", "sbd.tgz"):
        shutil.copy(tmp_path / "served" / name, tmp_path / "root/downloads" / name)
    prepare_voc(tmp_path / "root", **given)
    check(tmp_path / "root")
    assert [server.seen for server in servers] == [[], []]


def test_other_archives_are_refused(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    given = arguments(servers)
    given |= {"voc_url": given["sbd_url"], "voc_md5": None}
    refused(lambda: prepare_voc(tmp_path / "root", **given), words=("sbd.tgz", "VOCdevkit/VOC2012", "remove it"))
    assert os.listdir(tmp_path / "root") == ["downloads"]
    assert os.listdir(tmp_path / "root/downloads") == ["sbd.tgz"]


def test_annotations_that_do_not_fit(tmp_path: Path) -> None:
    root = write(tmp_path / "root", voc_files())
    write(root / "dataset", sbd_files())
    path = root / "Annotations/2008_000007.xml"
    path.write_bytes(xml("unicorn"))
    refused(prepare_voc, root, words=(str(path), "'unicorn'", "aeroplane", "tvmonitor"))
    path.unlink()
    refused(prepare_voc, root, words=("1 of 6", "2008_000007", "Annotations"))
    shutil.rmtree(root / "Annotations")
    refused(prepare_voc, root, words=("Annotations",))
    assert not list(root.glob("*.npy"))
