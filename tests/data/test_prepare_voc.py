import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Server, make_tar
from voc2012 import EXTRA, IDS, SIZE, TRAIN, VAL, ids_of, sbd_files, tree, voc_files, write, xml

from wsss import InputError
from wsss.data import download
from wsss.data.files import load_label_dict
from wsss.data.sbd import prepare_voc
from wsss.data.voc import VOC, VOC_CLASSES


def refused(call: Callable[..., Any], *args: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


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
